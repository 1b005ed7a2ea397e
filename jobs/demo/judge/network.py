"""The network of the judge: reads all attributes of a picture from its pixels.

Trained on the true labels of freshly drawn scenes, held-out contents included. No other model, database or training
set has these pictures.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from tqdm import trange

from jobs.demo.judge.labels import CLASSES, Labels, labels_of
from jobs.demo.models.training import warm_up_and_decay
from jobs.demo.recipe import JudgeTraining
from jobs.demo.world.content import Scene
from jobs.demo.world.training_scenes import draw_training_scenes

Pixels = npt.NDArray[np.uint8]

STREAM = 7
"""Of the random numbers of the judge's scenes. No other seed has this stream, so no other model has these pictures."""
EDGE = 64
CHANNELS = (32, 64, 96, 128)
MAX_SHIFT = 3
NOISE = 0.04
BLOCK = 256


class ContentJudge(torch.nn.Module):
    """Strided convolutions and a linear layer with logits for each attribute.

    In training, pictures are mirrored, blurred, shifted and noised at random: samples are less sharp than real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for inputs, outputs in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [torch.nn.Conv2d(inputs, outputs, 5 if inputs == 3 else 3, 2, 2 if inputs == 3 else 1)]
            layers += [torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
        classes = sum(map(len, CLASSES.values()))
        features = CHANNELS[-1] * (EDGE >> len(CHANNELS)) ** 2
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(features, classes))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (n, classes) of each attribute. pixels: (n, 3, EDGE, EDGE) uint8."""
        pictures = pixels.float() / 127.5 - 1
        inputs = _augmented(pictures) if self.training else pictures
        logits = self.layers(inputs.contiguous(memory_format=torch.channels_last))
        return dict(zip(CLASSES, logits.split([*map(len, CLASSES.values())], dim=1), strict=True))

    @torch.inference_mode()
    def predict(self, pixels: Pixels) -> Labels:
        """Class numbers by attribute, (n,) each. pixels: (n, EDGE, EDGE, 3)."""
        blocks = [self(block.movedim(3, 1)) for block in torch.from_numpy(pixels).split(BLOCK)]
        return {name: torch.cat([block[name].argmax(dim=1) for block in blocks]).numpy() for name in CLASSES}


def draw_scenes(config: JudgeTraining, world_seed: int) -> tuple[list[Scene], Pixels]:
    """The training scenes and their pictures (n, 3, EDGE, EDGE)."""
    entropy = np.random.SeedSequence([world_seed, config.seed, STREAM])
    seed = int(entropy.generate_state(1, np.uint64)[0])
    return draw_training_scenes(config.num_scenes, EDGE, seed, config.num_threads, every_content=True)


def train_judge(config: JudgeTraining, world_seed: int) -> ContentJudge:
    """Draw the scenes and train. Returns the network in eval mode."""
    torch.set_num_threads(config.num_threads)
    scenes, pixels = draw_scenes(config, world_seed)
    return fit(torch.from_numpy(pixels), labels_of(scenes), config)


def fit(pixels: torch.Tensor, labels: Labels, config: JudgeTraining) -> ContentJudge:
    """Train a network on pictures (n, 3, EDGE, EDGE) uint8 with labels. Returns it in eval mode."""
    torch.manual_seed(config.seed)
    judge = ContentJudge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wanted = {name: torch.from_numpy(values) for name, values in labels.items()}
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = warm_up_and_decay(optimizer, config.steps)
    progress = trange(config.steps, desc="judge", unit="step", mininterval=1)
    for step in progress:
        rng = np.random.default_rng([config.seed, step])
        batch = torch.from_numpy(rng.integers(0, len(pixels), config.batch_size))
        logits = judge(pixels[batch])
        loss = torch.stack([functional.cross_entropy(logits[name], wanted[name][batch]) for name in CLASSES]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval()


def _augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Randomly changed pictures (n, 3, EDGE, EDGE)."""
    mirrored, blurred = torch.rand(2, len(pictures), 1, 1, 1) < 0.5
    pictures = torch.where(mirrored, pictures.flip(3), pictures)
    smooth = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # A random share of the blur, so that all degrees of sharpness occur.
    pictures = torch.lerp(pictures, smooth, blurred * torch.rand(len(pictures), 1, 1, 1))
    padded = functional.pad(pictures, (MAX_SHIFT,) * 4, mode="reflect")
    x, y = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    return padded[:, :, y : y + EDGE, x : x + EDGE] + NOISE * torch.randn(pictures.shape)
