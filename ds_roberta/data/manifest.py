"""The manifest of a data folder: what is in the folder, and where it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_roberta.data.datasets_files import DATASETS_FILES, write_datasets_files
from ds_roberta.data.tokenizer import TokenizerInfo
from ds_roberta.errors import UserError
from ds_roberta.files import file_checksum, is_within, json_fingerprint, load_json, write_json

FORMAT_VERSION = 2
PACKING_VERSION = 3
"""Of the data that are prepared now."""
_BETWEEN_CHARACTERS = 3
"""The first packing version with which sequences are cut only between characters."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"
SPLITS = (TRAIN_SPLIT, VALIDATION_SPLIT)


@dataclass(frozen=True)
class InputPiece:
    """A part of an input, `start … end` as in the plan's pieces, and how many of a shard's documents came from it."""

    path: str
    start: int
    end: int
    documents: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest describes it; `file` is relative to the data folder.

    `pieces` are in the order of the documents, so their counts say which document came from which piece. All documents
    have the same `source`, empty if they have none.
    """

    file: str
    documents: int
    tokens: int
    bytes: int
    checksum: str
    chunk_checksums: tuple[str, ...]
    pieces: tuple[InputPiece, ...] = ()
    source: str = ""

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ShardInfo:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not such an entry, or its file is outside of the data folder.
        """
        pieces = tuple(InputPiece(**piece) for piece in entry["pieces"])
        info = cls(**{**entry, "chunk_checksums": tuple(entry["chunk_checksums"]), "pieces": pieces})
        texts = (info.file, info.checksum, info.source, *info.chunk_checksums, *(piece.path for piece in pieces))
        counts = (info.documents, info.tokens, info.bytes, *(piece.documents for piece in pieces))
        if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
            raise TypeError(f"not a shard: {entry!r}")
        if not is_within(info.file):
            raise ValueError(f"the shard {info.file!r} is outside of the folder")
        return info


@dataclass(frozen=True)
class InputInfo:
    """The outcome of reading one input file: documents_read = documents_kept + the sum over `rejected`.

    `source` is the name that the user gave it, if any. `places` are the first bad documents: `reason`, `byte` or `row`
    in the file, counted from 0, and `detail`. `damage` are the first places, in the same form, where a part of the file
    is lost; its documents are counted only if their number is known. `too_long_bytes` is the size of the documents that
    were rejected as too long. `without_value` counts, by option (`id_column`, `source_column`), those without a value
    in its column.
    """

    path: str
    documents_read: int
    documents_kept: int
    rejected: dict[str, int]
    source: str = ""
    places: tuple[dict[str, Any], ...] = ()
    damage: tuple[dict[str, Any], ...] = ()
    too_long_bytes: int = 0
    without_value: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> InputInfo:
        """The inverse of `dataclasses.asdict`, after a round trip through JSON."""
        lists = {name: tuple(entry.get(name, ())) for name in ("places", "damage")}
        return cls(**{**entry, **lists})


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; `plan` is the fingerprint of the work that made the data, empty for imports."""

    tokenizer: TokenizerInfo
    options: dict[str, Any]
    inputs: tuple[InputInfo, ...]
    splits: dict[str, tuple[ShardInfo, ...]]
    plan: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their sources, independent of the inputs' paths; a checkpoint is bound to it."""
        shards = {split: [shard.checksum for shard in shards] for split, shards in self.splits.items()}
        content: dict[str, Any] = {"tokenizer": self.tokenizer.fingerprint, "splits": shards}
        if any(map(self.sources, self.splits)):
            content["sources"] = {split: [shard.source for shard in shards] for split, shards in self.splits.items()}
        return json_fingerprint(content)

    @property
    def packing_version(self) -> int:
        """The version of packing when the data was prepared, which resumed runs keep to find the same sequences."""
        version: int = self.options.get("packing_version", _BETWEEN_CHARACTERS - 1)
        return version

    @property
    def cuts_between_characters(self) -> bool:
        """Whether sequences are cut only between characters; of packing version 2 they are cut anywhere."""
        return self.packing_version >= _BETWEEN_CHARACTERS

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits.get(split, ()))

    def sources(self, split: str) -> list[str]:
        """The names of a split's sources, sorted."""
        return sorted({shard.source for shard in self.splits.get(split, ())} - {""})

    def write(self, folder: Path) -> None:
        """Write the manifest and the small files by which `datasets` opens the folder; the manifest comes last."""
        names = [split for split in SPLITS if self.splits.get(split)]
        for split in names:
            names_of_shards = [Path(shard.file).name for shard in self.splits[split]]
            write_datasets_files(folder / split, split, names_of_shards, self.fingerprint)
        write_json(folder / "dataset_dict.json", {"splits": names})
        files = [folder / "dataset_dict.json", *(folder / TOKENIZER_FOLDER).iterdir()]
        files += [folder / split / name for split in names for name in DATASETS_FILES]
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "files": {path.relative_to(folder).as_posix(): file_checksum(path) for path in sorted(files)},
            **asdict(self),
        }
        write_json(folder / MANIFEST_NAME, {**content, "checksum": json_fingerprint(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check a data folder's manifest.

        Raises:
            UserError: as `parse` and `check_tokenizer` do.
        """
        manifest = cls.parse(folder)
        manifest.check_tokenizer(folder)
        return manifest

    @classmethod
    def parse(cls, folder: Path) -> Manifest:
        """Read a data folder's manifest without checking the other files.

        Raises:
            UserError: the folder or manifest is missing, of another format version or damaged.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"no prepared data in {str(folder)!r} ({MANIFEST_NAME} is missing): make it with "
                f"'preprocess shard --input TEXT --tokenizer DIR --output {folder}'"
            )
        try:
            content = load_json(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{str(path)!r} has format version {version}, this program reads {FORMAT_VERSION}: "
                    "prepare the data again with 'preprocess shard'"
                )
            if not isinstance(content["options"], dict) or not isinstance(content.get("files", {}), dict):
                raise TypeError("the options or files are not an object")
            if type(content["options"].get("packing_version", PACKING_VERSION)) is not int:
                raise TypeError("the version of packing is not a whole number")
            if outside := next((name for name in content.get("files", {}) if not is_within(name)), None):
                raise ValueError(f"the file {outside!r} is outside of the folder")
            manifest = cls(
                tokenizer=TokenizerInfo.from_json(content["tokenizer"]),
                options=content["options"],
                inputs=tuple(map(InputInfo.from_json, content["inputs"])),
                splits={split: tuple(map(ShardInfo.from_json, shards)) for split, shards in content["splits"].items()},
                plan=str(content.get("plan", "")),
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{str(path)!r} is damaged ({error!r}): prepare the data again") from error
        if manifest.fingerprint != content.get("fingerprint"):
            raise UserError(f"{str(path)!r} does not match its own fingerprint: prepare the data again")
        return manifest

    def check_tokenizer(self, folder: Path) -> None:
        """Raise `UserError` unless the tokenizer folder holds the tokenizer that made the ids."""
        tokenizer = TokenizerInfo.read(folder / TOKENIZER_FOLDER)
        if tokenizer != self.tokenizer:
            raise UserError(
                f"the data in {str(folder)!r} was made with another tokenizer (fingerprint "
                f"{self.tokenizer.fingerprint}) than the one in its tokenizer folder ({tokenizer.fingerprint}): "
                "put the right one back or prepare the data again"
            )


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` has a manifest, even of another version: then new data may replace it."""
    try:
        content = load_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {"format_version", "fingerprint", "splits"} <= content.keys()
    except (OSError, ValueError, AttributeError):
        return False
