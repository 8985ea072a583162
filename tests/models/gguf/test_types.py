"""The tables of the format compared with the authors' own Python package."""

import gguf.constants as official

from emlocal.models.gguf import types

WITHOUT_A_NAME = {"GUESSED", "MOSTLY_Q4_1_SOME_F16"}


def test_every_tensor_type_has_its_name_and_sizes() -> None:
    theirs = {t.value: (t.name, *official.GGML_QUANT_SIZES[t]) for t in official.GGMLQuantizationType}
    # The package counts the two scales of Q8_1 as float32; in llama.cpp they are float16 (test_file.py
    # checks).
    assert theirs[9] == ("Q8_1", 32, 40)
    theirs[9] = ("Q8_1", 32, 36)
    assert {code: types.TENSOR_TYPES.get(code) for code in theirs} == theirs


def test_every_value_type_has_its_code() -> None:
    names = [t.name.lower() for t in sorted(official.GGUFValueType)]
    assert list(types.VALUE_TYPE_NAMES) == names
    assert {t.value for t in official.GGUFValueType} == {*types.SCALARS, types.STRING, types.ARRAY}
    for name in ("STRING", "ARRAY", "BOOL", "UINT16", "UINT32", "INT32", "FLOAT32"):
        assert getattr(types, name) == official.GGUFValueType[name]


def test_every_file_type_has_its_name() -> None:
    theirs = {
        t.value: t.name.removeprefix("ALL_").removeprefix("MOSTLY_")
        for t in official.LlamaFileType
        if t.name not in WITHOUT_A_NAME
    }
    assert {code: types.FILE_TYPES.get(code) for code in theirs} == theirs
