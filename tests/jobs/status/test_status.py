"""The status command: the progress of each stage, as a table and as JSON, without heavy libraries."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli.recipe import load_recipe
from jobs.status.__main__ import has_color, main
from jobs.status.stages import statuses
from jobs.status.table import WIDTH, table
from pipeline.filter.metadata import plan_pieces
from pipeline.recipe import EmbedConfig, FilterConfig, ImportConfig
from pipeline.runtime.status import Status
from retrieval.clip.head_files import head_digest, heads_identity
from retrieval.clip.weight_files import weight_files
from retrieval.errors import UserError
from retrieval.imports.pieces import source_identity
from retrieval.imports.source import VectorSource
from retrieval.index.hidden import store_hidden
from retrieval.recipe import ClipConfig
from retrieval.storage import stage_folder
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, write_manifest, write_record
from retrieval.storage.object_store import ListedFile
from retrieval.storage.root import FileRecord, Root

NOW = 2_000_000_000.0
REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = """
root = {root!r}
[filter]
metadata = "somewhere"
[download]
contact = "me@example.org"
[neighbors]
k = 4
[autoencoder]
kind = "kl"
path = "models/kl"
[model]
latent_channels = 4
context_dim = 8
channels = [32]
attention = [1]
[diffusion]
[train]
name = "small"
source = "images"
size = 64
k = 4
global_batch = 16
micro_batch = 8
steps = 1000
log_every = 10
"""
AGAIN = "; all is made again with --remake, 0 rows, 0.0 MB, at least 0 s"
"""What is stated for a manifest of `write_made`."""
DEFAULT_IMPORT = json.dumps([ImportConfig().model_dump(mode="json"), False])
"""The input `import` of a download from `make import` without a section `import`."""
HEAVY = ("torch", "ray", "faiss", "open_clip", "diffusers", "deepspeed", "img2dataset")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(root=str(tmp_path / "run")))
    return path


def write_filter(recipe: Path) -> Manifest:
    """A finished filter stage: two shards of kept rows, and one shard of dropped rows."""
    loaded = load_recipe(recipe)
    config = loaded.sections["filter"]
    shards = (
        ShardRecord("train/00000-00000", 60, (FileRecord("a", 600, ""),)),
        ShardRecord("database/00000-00000", 40, (FileRecord("b", 400, ""),)),
        ShardRecord("dropped/00000", 0, (), {"unsafe": 5}),
    )
    digest = fingerprint("filter", 1, config, {"metadata": "m"})
    manifest = Manifest("filter", 1, digest, {"metadata": "m"}, config.model_dump(mode="json"), shards, {}, 10.0)
    write_manifest(loaded.root, manifest)
    return manifest


def write_metrics(root: Root, lines: list[dict[str, float]], incomplete: str, time_s: float) -> None:
    path = root.local_path("runs/small/train/metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + incomplete)
    os.utime(path, (time_s, time_s))


def statuses_by_stage(recipe: Path, *overrides: str) -> dict[str, Status]:
    return {status.stage: status for status in statuses(load_recipe(recipe, overrides), NOW)}


def test_the_command_imports_no_heavy_library(recipe: Path) -> None:
    write_filter(recipe)
    code = (
        "import sys; from jobs.status.__main__ import main; main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_recipe_decides_the_stages_and_upstream_manifests_their_totals(recipe: Path) -> None:
    manifest = write_filter(recipe)
    root = load_recipe(recipe).root
    root.write_json("download/started.json", {"fingerprint": "p"})
    write_record(root, "download", "p", ShardRecord("train/00000-00000", 50, (), {"not_found": 10}))
    stages = statuses_by_stage(recipe)
    assert list(stages) == ["filter", "download", "neighbors", "train"]
    filtered, downloaded = stages["filter"], stages["download"]
    assert (filtered.state, filtered.total, filtered.rows) == ("finished", 2, manifest.rows)
    assert filtered.reasons == {"unsafe": 5}
    assert (downloaded.state, downloaded.done, downloaded.total) == ("unfinished", 1, 2)
    assert (stages["neighbors"].state, stages["train"].state) == ("not started", "not started")


def test_the_records_of_an_unfinished_stage_are_listed_in_parts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_filter(recipe)
    monkeypatch.setattr(stage_folder, "SHARDS_PER_PART", 1)
    splits_of: dict[str, list[str]] = {}
    files = Root.files

    def noted(root: Root, folder: str, splits: Sequence[str] = ()) -> Iterator[ListedFile]:
        splits_of[folder] = [*splits]
        return files(root, folder, splits)

    monkeypatch.setattr(Root, "files", noted)
    statuses_by_stage(recipe)
    assert "download/records/train/00000-00000" in splits_of["download/records/"]
    assert splits_of["neighbors/records/"] == [], "nothing states its shards"


def test_a_changed_setting_is_stale_and_a_changed_speed_is_not(recipe: Path) -> None:
    write_filter(recipe)
    assert statuses_by_stage(recipe, "filter.workers=7")["filter"].state == "finished"
    stale = statuses_by_stage(recipe, "filter.min_edge=512")["filter"]
    again = "all is made again with --remake, 100 rows, 0.0 MB, at least 10 s"
    assert (stale.state, stale.note) == ("stale", f"made with min_edge = 768, the recipe has 512; {again}")


def write_made(recipe: Path, stage: str, upstream: dict[str, str], inputs: dict[str, str], **values: object) -> None:
    """The manifest of a finished stage of the recipe, begun and ended now."""
    loaded = load_recipe(recipe)
    config = loaded.sections[stage.partition("/")[0]]
    digest = fingerprint(stage, 1, config, upstream)
    settings = config.model_dump(mode="json")
    write_manifest(loaded.root, Manifest(stage, 1, digest, upstream, settings, (), values, 0.0, inputs))


def test_changed_metadata_is_stale_and_the_files_are_counted(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    columns = {"URL": ["http://a.org/1"], "TEXT": ["a"], "WIDTH": [800], "HEIGHT": [600]}
    rows = pa.table(columns | {"pwatermark": [0.1], "punsafe": [0.1]})
    for name in ("b", "c"):
        pq.write_table(rows, folder / f"{name}.parquet")
        os.utime(folder / f"{name}.parquet", (NOW - 1e9, NOW - 1e9))
    pq.write_table(rows.slice(0, 0), folder / "no_rows.parquet")
    recipe.write_text(recipe.read_text().replace('"somewhere"', f'"{folder}"'))
    plan = plan_pieces(load_recipe(recipe)[FilterConfig], {})
    pieces = {piece.name: [piece.file, *piece.row_groups] for piece in plan.pieces}
    write_made(recipe, "filter", {"metadata": plan.identity}, {"blocklist": ""}, pieces=pieces)

    def current() -> tuple[str, str]:
        status = statuses_by_stage(recipe)["filter"]
        return status.state, status.note

    assert current() == ("finished", "")
    os.utime(folder / "b.parquet", (NOW, NOW))
    assert current() == ("finished", "")
    pq.write_table(rows.set_column(1, "TEXT", [["another"]]), folder / "b.parquet")
    assert current() == ("stale", "made from other metadata: 1 file changed" + AGAIN)
    (folder / "b.parquet").unlink()
    (folder / "no_rows.parquet").unlink()
    for name in ("a", "d"):
        pq.write_table(rows, folder / f"{name}.parquet")
    assert current() == ("stale", "made from other metadata: 2 files new, 1 file removed" + AGAIN)
    (tmp_path / "listed.txt").write_text("example.org")
    listed = statuses_by_stage(recipe, f"filter.blocklist={tmp_path}/listed.txt")["filter"]
    assert listed.note.endswith("1 file removed; made with another blocklist" + AGAIN)
    shutil.rmtree(folder)
    state, note = current()
    assert (state, f"whether its inputs changed is unknown: {folder} is missing" in note) == ("finished", True)


def test_changed_blocklists_heads_and_hidden_images_are_stale_and_named(recipe: Path, tmp_path: Path) -> None:
    head, listed = tmp_path / "head.safetensors", tmp_path / "listed.txt"
    head.write_bytes(b"weights")
    listed.write_text("example.org")
    section = f'[embed.heads.safe]\nfile = "{head}"\nactivation = "relu"\noutput = "none"\nmax_score = 0.5\n'
    section += '[clip]\nmodel = "ViT-B-32"\n'
    recipe.write_text(recipe.read_text() + section)
    loaded = load_recipe(recipe)
    heads = loaded[EmbedConfig].heads
    digests = {"safe": head_digest("safe", heads["safe"], b"weights")}
    write_made(recipe, "download", {"filter": write_filter(recipe).identity}, {"blocklist": ""})
    made = {"heads": heads_identity(digests, heads)}
    write_made(recipe, "embed", {}, made, encoder={"model": "ViT-B-32"})
    write_made(recipe, "neighbors", {}, {})
    names = ("download", "embed", "neighbors")
    stages = statuses_by_stage(recipe)
    assert [stages[name].state for name in names] == ["finished"] * 3
    head.write_bytes(b"others")
    store_hidden(loaded.root.child("index"), np.array([7]))
    stages = statuses_by_stage(recipe, f"download.blocklist={listed}", "clip.model=ViT-L-14")
    notes = ["made with another blocklist", "made with other heads; made with the CLIP model ViT-B-32" + AGAIN]
    found = [stages[name].note.partition("; near copies")[0] for name in names]
    assert found == [*notes, "made with other hidden images"]
    assert {stages[name].state for name in names} == {"stale"}


def test_samples_with_images_that_are_hidden_later_are_stale(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + '[sample]\nprompts = ["a stag"]\ndatabases = ["woodcut"]\n')
    loaded = load_recipe(recipe)
    config, upstream = loaded.sections["sample"], {"database/woodcut": "w"}
    digest = fingerprint("sample", 1, config, upstream)
    made = Manifest("runs/small/sample", 1, digest, upstream, config.model_dump(mode="json"), (), {}, 0.0)
    write_manifest(loaded.root, made)
    store_hidden(loaded.root.child("index"), np.array([7]))
    assert statuses_by_stage(recipe)["sample"].state == "finished"
    store_hidden(loaded.root.child("databases/woodcut"), np.array([7]))
    stale = statuses_by_stage(recipe)["sample"]
    assert (stale.state, stale.note) == ("stale", "made with other hidden images")


def test_imported_pictures_are_stale_with_another_blocklist(recipe: Path, tmp_path: Path) -> None:
    write_made(recipe, "download", {"source": "s", "import": DEFAULT_IMPORT}, {"blocklist": ""})
    (tmp_path / "listed.txt").write_text("example.org")
    assert statuses_by_stage(recipe)["download"].state == "finished"
    imported = statuses_by_stage(recipe, f"download.blocklist={tmp_path}/listed.txt")["download"]
    assert (imported.state, imported.note) == ("stale", "made with another blocklist")


def test_imported_pictures_are_stale_with_other_settings_of_the_import(recipe: Path) -> None:
    write_made(recipe, "download", {"source": "s", "import": DEFAULT_IMPORT}, {"blocklist": ""})
    assert statuses_by_stage(recipe)["download"].state == "finished"
    stale = statuses_by_stage(recipe, "import.seed=3", "import.rows_per_shard=8")["download"]
    changes = "made with import.seed = 0, the recipe has 3; with import.rows_per_shard = 1000, the recipe has 8"
    assert (stale.state, stale.note) == ("stale", changes + AGAIN)


def test_an_index_of_other_vectors_is_stale(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "[index]\n")
    write_made(recipe, "index", {"embed": "e"}, {}, rows=[3])
    assert statuses_by_stage(recipe)["index"].state == "finished"
    np.save(tmp_path / "vectors.npy", np.ones((3, 4), np.float16))
    override = f"vectors.source={tmp_path / 'vectors.npy'}"
    assert statuses_by_stage(recipe, override)["index"].note == "made from embed, the recipe has [vectors]" + AGAIN
    identity = source_identity(VectorSource(tmp_path / "vectors.npy"))
    write_made(recipe, "index", {"vectors": identity, "clip": "c"}, {}, rows=[3])
    assert statuses_by_stage(recipe, override)["index"].state == "finished"
    assert statuses_by_stage(recipe)["index"].note.startswith("made from vectors of another tool")
    np.save(tmp_path / "vectors.npy", np.ones((5, 4), np.float16))
    stale = statuses_by_stage(recipe, override)["index"]
    assert (stale.state, stale.note) == ("stale", "made from other vectors" + AGAIN)
    (tmp_path / "vectors.npy").unlink()
    assert "whether its inputs changed is unknown" in statuses_by_stage(recipe, override)["index"].note


def test_an_index_of_vectors_is_stale_with_other_weights_of_clip(recipe: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.ones((3, 4), np.float16))
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    clip = f'[clip]\nmodel = "clip"\npretrained = "{weights}"\n'
    recipe.write_text(f'{recipe.read_text()}[index]\n[vectors]\nsource = "{tmp_path / "vectors.npy"}"\n{clip}')
    upstream = {"vectors": source_identity(VectorSource(tmp_path / "vectors.npy")), "clip": "c"}
    files = weight_files(load_recipe(recipe)[ClipConfig])
    write_made(recipe, "index", upstream, {}, rows=[3], encoder={"model": "clip"}, clip_files=files)
    assert statuses_by_stage(recipe)["index"].state == "finished"
    weights.write_bytes(b"another")
    assert statuses_by_stage(recipe)["index"].note == "made with other weights of CLIP" + AGAIN


def test_vectors_and_latents_of_another_precision_are_stale(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "[embed]\n[latents]\nsize = 64\ngpus_per_worker = 0.5\n")
    write_made(recipe, "embed", {"precision": "bf16"}, {})
    write_made(recipe, "latents/64", {}, {})
    stages = statuses_by_stage(recipe)
    assert (stages["embed"].state, stages["embed"].note) == ("stale", "made in bf16, not fp32" + AGAIN)
    unrecorded = ("stale", "made by an earlier version, which did not record the precision" + AGAIN)
    assert (stages["latents/64"].state, stages["latents/64"].note) == unrecorded
    stages = statuses_by_stage(recipe, "embed.gpus_per_worker=1.0", "latents.gpus_per_worker=0.0")
    assert [stages[name].state for name in ("embed", "latents/64")] == ["finished"] * 2
    write_made(recipe, "embed", {}, {})
    assert statuses_by_stage(recipe, "embed.gpus_per_worker=1.0")["embed"].note == "made in fp32, not bf16" + AGAIN
    recipe.write_text(recipe.read_text().replace("[embed]\n", "[embed]\ngpus_per_worker = 1.0\n"))
    write_made(recipe, "embed", {}, {})
    assert statuses_by_stage(recipe)["embed"].note == unrecorded[1]


@pytest.mark.parametrize("in_folder", [True, False])
def test_other_weights_of_clip_under_the_same_name_are_stale(recipe: Path, tmp_path: Path, in_folder: bool) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(b"weights")
    settings = f'model = "local-dir:{folder}"' if in_folder else f'model = "clip"\npretrained = "{weights}"'
    recipe.write_text(f"{recipe.read_text()}[embed]\n[clip]\n{settings}\n")
    write_filter(recipe)
    files = weight_files(load_recipe(recipe)[ClipConfig])
    write_made(recipe, "embed", {}, {"heads": ""}, encoder={"model": "clip"}, clip_files=files)

    def note() -> str:
        return statuses_by_stage(recipe)["embed"].note

    assert note() == ""
    os.utime(weights, (1, 1))
    assert note() == ""
    weights.write_bytes(b"another")
    assert note() == "made with other weights of CLIP" + AGAIN
    weights.unlink()
    assert note() == ""
    (folder / "other.safetensors").write_bytes(b"another")
    assert note() == ("made with other weights of CLIP" + AGAIN if in_folder else "")


def test_a_checkpoint_of_another_name_is_stale_unless_it_is_a_copy(recipe: Path, tmp_path: Path) -> None:
    for name, content in (("a.pt", b"weights"), ("b.pt", b"another"), ("copy.pt", b"weights")):
        (tmp_path / name).write_bytes(content)
    recipe.write_text(f'{recipe.read_text()}[embed]\n[clip]\nmodel = "clip"\npretrained = "{tmp_path}/a.pt"\n')
    write_filter(recipe)
    files = weight_files(load_recipe(recipe)[ClipConfig])
    write_made(recipe, "embed", {}, {"heads": ""}, encoder={"model": "clip"}, clip_files=files)
    notes = {
        name: statuses_by_stage(recipe, f"clip.pretrained={tmp_path}/{name}")["embed"].note
        for name in ("a.pt", "b.pt", "copy.pt", "missing.pt")
    }
    assert notes == {"a.pt": "", "b.pt": "made with other weights of CLIP" + AGAIN, "copy.pt": "", "missing.pt": ""}


def test_training_shows_the_last_complete_line_of_its_metrics(recipe: Path) -> None:
    root = load_recipe(recipe).root
    line = {"step": 100, "loss": 0.9, "images_per_s": 30.0, "seconds_per_step": 0.5, "paused_s": 0.1}
    write_metrics(root, [line, {**line, "step": 200, "loss": 0.5}], '{"step": 300, "lo', NOW - 4)
    status = statuses_by_stage(recipe)["train"]
    assert (status.state, status.unit, status.done, status.total) == ("unfinished", "steps", 200, 1000)
    assert (status.rows, status.rows_per_s) == (200 * 16, 30.0)
    assert status.eta_s == pytest.approx(800 * 0.6)
    assert status.note == "loss 0.5000 at step 200, logged 4 s ago"


def test_a_stalled_training_has_no_estimate_of_the_time_left(recipe: Path) -> None:
    root = load_recipe(recipe).root
    line = {"step": 100, "loss": 0.9, "images_per_s": 30.0, "seconds_per_step": 0.5, "paused_s": 0.1}
    write_metrics(root, [line], "", NOW - 400)
    status = statuses_by_stage(recipe)["train"]
    assert status.eta_s is None
    assert status.note.endswith("logged 7 min ago: interrupted?")


@pytest.mark.parametrize("seconds", ["-1", "nan", "1e9"])
def test_an_interval_that_is_none_is_an_error_of_the_arguments(
    recipe: Path, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_filter(recipe)
    with pytest.raises(SystemExit) as ended:
        main([str(recipe), f"--watch={seconds}"])
    assert ended.value.code == 2
    assert f"--watch: wanted 0 to 86,400 seconds, got {seconds}" in capsys.readouterr().err


def test_a_missing_root_is_an_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        statuses_by_stage(recipe)
    with pytest.raises(SystemExit) as stopped:
        main([str(recipe)])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("width", [40, 80, WIDTH, 200])
def test_the_table_fits_every_terminal_at_the_real_sizes(width: int) -> None:
    reasons = {f"a_long_reason_word_{n}": 10**9 - n for n in range(12)}
    stale = Status("neighbors", "stale", "made with " + "words " * 40, "partitions", "shards", 231_349, 231_350)
    unfinished = Status(
        "download", "unfinished", "", "", "shards", 231_349, 231_350, 2_313_490_000, 98_765.4, 9 * 10**13
    )
    estimate = Status(**{**vars(unfinished), "reasons": reasons, "eta_s": 6e5, "is_estimate": True})
    lines = table([stale, estimate, Status("train", "not started")], width)
    assert max(map(len, lines.splitlines())) <= width
    words = " ".join(lines.split())
    for text in ("~2,313,490,000", "231,349/231,350 shards", "98,765", "~90.0 TB", "6 d 23 h", "7 more reasons"):
        assert text in words
    assert ("rows/s on disk" in words) == (width >= WIDTH)  # the headings


def test_the_bar_is_full_only_when_all_shards_are_done() -> None:
    lines = [table([Status("embed", "unfinished", done=done, total=1000)]) for done in (0, 500, 999, 1000)]
    bars = [line.splitlines()[1] for line in lines]
    assert [bar.count("━") for bar in bars] == [0, 8, 15, 16]
    assert [bar.split()[3] for bar in bars] == ["0%", "50%", "99%", "100%"]


def test_color_is_for_terminals_and_changes_no_text() -> None:
    stages = [Status("filter", "finished", done=2, total=2), Status("embed", "stale", "made with k = 8")]
    plain, colored = table(stages), table(stages, color=True)
    assert "\x1b" not in plain
    assert "\x1b[32m━" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain
    terminal = Terminal()
    assert has_color(terminal, {"TERM": "xterm"})
    assert not has_color(terminal, {"NO_COLOR": "1"})
    assert not has_color(terminal, {"TERM": "dumb"})
    assert not has_color(io.StringIO(), {})


def test_json_has_every_field(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_filter(recipe)
    main([str(recipe), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in printed["stages"]] == ["filter", "download", "neighbors", "train"]
    assert printed["stages"][0]["rows"] == 100
    assert printed["stages"][0]["eta_s"] is None
