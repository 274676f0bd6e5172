"""Data of users: pictures with captions, edits, questions, stories, as packed rows of tokens.

rows = read_rows("photos/")                        # folder, file, dataset
example = ExampleWriter(processor)(rows[0])        # ids, and which of them the assistant says
prepare("photos/", "prepared/", vision_tokenizer, processor)   # or once for all rows, with the images' codes
stream = PackedRows([Source("photos", PreparedRows("prepared/"), read_example)], processor, row_length=1024)
"""

from .examples import Example, ExampleWriter, encode_images, labels_of, without_text
from .mixing import Collator, PackedRows, Source, best_fit, mix, pack
from .prepare import PreparedRows, is_prepared, prepare, read_example
from .reading import read_rows, to_messages

__all__ = [
    "Collator",
    "Example",
    "ExampleWriter",
    "PackedRows",
    "PreparedRows",
    "Source",
    "best_fit",
    "encode_images",
    "is_prepared",
    "labels_of",
    "mix",
    "pack",
    "prepare",
    "read_example",
    "read_rows",
    "to_messages",
    "without_text",
]
