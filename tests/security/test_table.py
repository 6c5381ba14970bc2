"""The table of docs/security.md is that of the inputs that these tests make."""

import re
from pathlib import Path

import test_damaged_logs
import test_hostile_arrays
import test_hostile_catalogues
import test_hostile_datasets
import test_hostile_folders
import test_hostile_models
import test_hostile_programs
import test_hostile_runs
import test_hostile_shards
import test_hostile_tensors
import test_hostile_uploads
from beside import beside

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "security.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"
TORCH = beside("pretrained/test_hostile_torch_files.py")


def plain(pattern):
    """The first of the words that a pattern stands for."""
    first = re.sub(r"\\(.)", r"\1", re.split(r"(?<!\\)\|", pattern)[0])
    return first.replace(".*", " ... ").strip("( ")


# A kind of file; its inputs by name; and how one ends: in these words, or in the input's own.
KINDS = (
    ("torch's files", TORCH.HOSTILE, str),
    ("`.safetensors`", test_hostile_models.SAFETENSORS, plain),
    ("in the place of weights", test_hostile_models.NO_FILES, plain),
    ("numbers of a model", test_hostile_models.NUMBERS, plain),
    ("EfficientNet's weights", test_hostile_tensors.EFFICIENTNET, plain),
    ("a transformer's weights", test_hostile_tensors.TRANSFORMERS, plain),
    ("weights in several files", test_hostile_tensors.INDEXES, plain),
    ("an exported model's config", test_hostile_models.CONFIGS, plain),
    ("a model's arguments", test_hostile_models.MODELS, "no model can be built from"),
    ("a program", test_hostile_programs.PROGRAMS, plain),
    (
        "an exported model's cut",
        test_hostile_models.CUTS,
        "cannot be used, or a choice that is none",
    ),
    ("an id of the hub", test_hostile_models.IDS, "no id of the hub"),
    ("a transformer's folder", test_hostile_folders.FOLDERS, plain),
    ("images", test_hostile_datasets.IMAGES, plain),
    ("a photo sent to the server", test_hostile_uploads.UPLOADS, plain),
    ("in the place of a photo or a CSV", test_hostile_datasets.NO_FILES, plain),
    ("a CSV manifest", test_hostile_datasets.MANIFESTS, plain),
    ("an archive of photos", test_hostile_datasets.ARCHIVES, "is damaged"),
    ("DeepFashion's lists", test_hostile_datasets.LISTED, plain),
    ("a prepared dataset", test_hostile_datasets.INFOS, "is damaged"),
    ("columns kept of a dataset", test_hostile_datasets.COLUMNS, "read anew"),
    ("arrays in an archive", test_hostile_arrays.ARRAYS, plain),
    ("a run's config", test_hostile_runs.CONFIGS, plain),
    ("a run's dataset", test_hostile_runs.CODE, "which would import code"),
    ("a run's parts", test_hostile_runs.PARTS, "which would import code"),
    ("a run's folder of datasets", test_hostile_runs.PLACES, "keeps its datasets in"),
    ("a run that goes on", test_hostile_runs.LINKS, "is a link to"),
    ("a catalogue", test_hostile_catalogues.CHANGED, plain),
    ("a catalogue's photo", test_hostile_catalogues.TYPES, "is not as it was written"),
    ("a catalogue's payload", test_hostile_catalogues.PAYLOADS, "is no JSON"),
    ("an embedding to find by", test_hostile_catalogues.EMBEDDINGS, "cannot be read"),
    (
        "an address in Milvus",
        test_hostile_catalogues.ADDRESSES,
        "give milvus://HOST:PORT/COLLECTION",
    ),
    ("shards of embeddings", test_hostile_shards.SHARDS, plain),
    ("a run's log", test_damaged_logs.DAMAGED_LINES, "the other lines are read, the file is kept"),
)


def table():
    lines = ["| kind | input | what it ends in |", "| --- | --- | --- |"]
    for kind, inputs, end in KINDS:
        for name, made in inputs.items():
            words = end if isinstance(end, str) else end(made[-1])
            lines.append(f"| {kind} | {escaped(name)} | {escaped(words)} |")
    count = sum(len(inputs) for _, inputs, _ in KINDS)
    return f"\n{count} inputs; none is accepted in silence.\n\n" + "\n".join(lines) + "\n\n"


def escaped(text):
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return re.sub(r"([\\|<*_`])", r"\\\1", text)


def test_the_page_lists_what_is_tested():
    text = PAGE.read_text()
    found = text[text.index(START) + len(START) : text.index(END)]
    assert found == table(), "write it: PYTHONPATH=tests python tests/security/test_table.py"


def test_there_are_more_than_two_hundred_inputs():
    assert sum(len(inputs) for _, inputs, _ in KINDS) > 200


if __name__ == "__main__":
    page = PAGE.read_text().partition(START)[0]
    PAGE.write_text(page + START + table() + END)
