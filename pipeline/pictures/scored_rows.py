"""The rows of `embed`, divided by the scores of the recipe's heads.

Writes `embed/<shard>.parquet` with the scores as last columns and, if heads leave out rows,
`embed/<shard>.refused.parquet` with these rows, their reasons and their numbers among all rows. So other heads or
thresholds are applied to a finished shard without computing CLIP again.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.clip.head_files import heads_identity
from retrieval.clip.heads import Head
from retrieval.index.routing import unit
from retrieval.recipe import HeadConfig
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.manifest import ShardRecord, delete_record, files_exist, read_record
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

REFUSED = ".refused.parquet"
OF_HEADS = (str(Reason.HIGH_SCORE), str(Reason.LOW_SCORE))
ROW = "row"
Reasons = dict[str, int]


@dataclass(frozen=True)
class ScoredRows:
    """Reads and writes the shards of `embed`. heads: by name, in the order in which they are applied."""

    root: Root
    heads: dict[str, Head]
    config: dict[str, HeadConfig]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What `Stage.inputs` says of the heads: their weights, settings and thresholds."""
        identity = heads_identity({name: head.digest for name, head in self.heads.items()}, self.config)
        return {"heads": identity} if identity else {}

    def stored(self, shard: str) -> tuple[pa.Table, Reasons] | None:
        """All rows of a finished shard without scores, and the rows that were never embedded by reason; None if new.

        Deletes its record: the files are written again.
        """
        record = read_record(self.root, "embed", shard)
        if record is None or not files_exist(self.root, record[1]):
            return None
        parts = []
        for record_of_file in record[1].files:
            with self.root.open(record_of_file.name) as file:
                parts.append(pq.read_table(file))
        delete_record(self.root, "embed", shard)
        columns = _columns(parts[0].schema)
        table = pa.concat_tables(part.select(columns.names).cast(columns) for part in parts)
        if len(parts) > 1:
            numbers = parts[1][ROW].to_numpy()
            # Numbers of erased pictures are missing: then rows that were refused follow too late.
            kept = np.setdiff1d(np.arange(len(parts[0]) + numbers.max(initial=0) + 1), numbers)[: len(parts[0])]
            table = take_rows(table, np.argsort(np.concatenate([kept, numbers])))
        return table, {word: count for word, count in record[1].reasons.items() if word not in OF_HEADS}

    def write(self, shard: str, table: pa.Table, reasons: Reasons) -> ShardRecord:
        """Write the rows of a shard that no head leaves out, and the others. table: as `with_vectors` gives it."""
        vectors = unit(schema.vectors(table, schema.EMBEDDING))
        scores = {name: head.scores(vectors) for name, head in self.heads.items()}
        for name, values in scores.items():
            table = table.append_column(f"{schema.SCORE}{name}", pa.array(values))
        words = self._reasons(scores, len(table))
        kept, refused = np.flatnonzero(words == ""), np.flatnonzero(words != "")
        dim = vectors.shape[1]
        name = f"embed/{shard}.parquet"
        files = [schema.write_table(self.root, name, take_rows(table, kept), schema.embeddings(dim))]
        if len(refused):
            others = take_rows(table, refused).append_column("reason", pa.array(words[refused].tolist(), pa.string()))
            others = others.append_column(ROW, pa.array(refused))
            with self.root.writing(f"embed/{shard}{REFUSED}") as pending:
                pq.write_table(others, pending.path, compression="zstd", use_dictionary=schema.REPEATING)
            files.append(pending.record)
        counts = {word: int((words == word).sum()) for word in OF_HEADS}
        counts = {str(word): count for word, count in (reasons | counts).items() if count}
        return ShardRecord(shard, len(kept), tuple(files), counts)

    def _reasons(self, scores: dict[str, npt.NDArray[np.float32]], num_rows: int) -> npt.NDArray[np.object_]:
        """Why each row is left out, "" if it is not. A score that is no number is too high or too low."""
        words = np.full(num_rows, "", object)
        for name, values in scores.items():
            highest, lowest = self.config[name].max_score, self.config[name].min_score
            if highest is not None:
                words[(words == "") & ~(values <= highest)] = str(Reason.HIGH_SCORE)
            if lowest is not None:
                words[(words == "") & ~(values >= lowest)] = str(Reason.LOW_SCORE)
        return words


def _columns(stored: pa.Schema) -> pa.Schema:
    """The columns of a stored table as `with_vectors` gives them: without scores, and without what Parquet adds."""
    dim = stored.field(schema.EMBEDDING).type.list_size
    known = pa.schema([*schema.embeddings(dim), *schema.DETAILS])
    lists = {name: known.field(name) for name in (schema.EMBEDDING, schema.BOX)}
    kept = [field for field in stored if not field.name.startswith(schema.SCORE)]
    return pa.schema([lists.get(field.name, field.remove_metadata()) for field in kept])
