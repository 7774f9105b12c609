"""Where documents begin, as the manifest of their dataset says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretraining.checks import warn_of_documents
from pretraining.documents import Separator, document_offsets, separator_of
from utils.errors import UserError

BOS, EOS = Separator(1, begins=True), Separator(1, begins=False)


def test_each_row_follows_the_token_of_its_dataset():
    inputs = np.array([[5, 1, 6, 7], [1, 8, 9, 1]])
    assert document_offsets(inputs, [BOS, BOS]).tolist() == [0, 1, 4, 7, 8]
    assert document_offsets(inputs, [EOS, EOS]).tolist() == [0, 2, 4, 5, 8]
    assert document_offsets(inputs, [BOS, EOS]).tolist() == [0, 1, 4, 5, 8]


def test_offsets_have_one_shape_until_documents_are_very_short():
    sizes = {}
    for length in (1024, 300, 128, 127, 2):
        tokens = np.full((2, 1024), 5)
        tokens[:, ::length] = 1
        sizes[length] = len(document_offsets(tokens, [BOS, BOS]))
    assert sizes == {1024: 17, 300: 17, 128: 17, 127: 33, 2: 1025}


def test_the_manifest_says_which_token_parts_documents():
    assert separator_of("d", {"settings": {"bos_id": 0, "eos_id": 7}}) == Separator(0, begins=True)
    assert separator_of("d", {"settings": {"bos_id": None, "eos_id": 0}}) == Separator(0, begins=False)
    for manifest, why in (({"settings": {"bos_id": None, "eos_id": None}}, "names neither"), (None, "no manifest")):
        with pytest.raises(UserError, match=rf"--train.document_masking=true: my/data: .*{why}.*--add_eos=true"):
            separator_of("my/data", manifest)


def test_a_packed_dataset_is_for_one_context(capsys):
    manifest = {"settings": {"bos_id": 0, "eos_id": 1}, "pack_tokens": 2049}
    for context in (2048, None):
        warn_of_documents(Path("DATA/train"), manifest, context)
    assert not capsys.readouterr().err
    warn_of_documents(Path("DATA/train"), manifest, 1024)
    said = capsys.readouterr().err
    assert "DATA/train: packed into blocks of 2,049" in said
    assert "--train.max_seq_length=2048, or merge again with --pack_tokens=1025" in said
