"""Files that try to run something while they are read: refused, and nothing has run (NEEDS S01)."""

import functools
import importlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from bevt_fast.errors import DataError
from bevt_fast.tokenizers import _restricted_pickle, dalle


class Call:
    """Pickles as an instruction to call `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(path, content, legacy):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def attacks(canary):
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    tensor = torch.zeros(4)
    rebuild, arguments = tensor.__reduce_ex__(2)
    inner = io.BytesIO()
    torch.save(Call(os.system, shell), inner)
    return {
        "shell": Call(os.system, shell),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "import": Call(importlib.import_module, "antigravity"),
        "getattr": Call(getattr, "text", "upper"),
        "partial": Call(functools.partial, os.system, shell),
        "load from bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "torch.load": Call(torch.load, str(canary) + ".pt"),
        "hub": Call(torch.hub.load, "/nowhere", "model"),
        "in a dict": {"blocks.input.w": tensor, "blocks.input.b": Call(os.system, shell)},
        "in a rebuilt tensor": Call(rebuild, *arguments[:-1], Call(os.system, shell)),
        "as a tensor's storage": Call(rebuild, Call(os.system, shell), *arguments[1:]),
        "in an ordered dict": OrderedDict(first=[({"x": (Call(eval, code),)},)]),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", attacks("canary"))
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, name, legacy):
    canary, file = tmp_path / "canary", tmp_path / "encoder.pkl"
    write(file, attacks(canary)[name], legacy)
    with pytest.raises(DataError, match=r"refused, and nothing of it was run"):
        dalle.load(file)
    assert not canary.exists()


def test_the_attacks_are_armed(tmp_path):
    for name in ("shell", "eval", "exec"):
        canary = tmp_path / name
        function, arguments = attacks(canary)[name].__reduce__()
        function(*arguments)
        assert canary.exists()


def test_the_refusal_names_what_was_asked_for(tmp_path):
    write(tmp_path / "encoder.pkl", Call(os.system, "true"), legacy=False)
    with pytest.raises(DataError, match=r"encoder.pkl asks for posix.system, which tensors do not need"):
        dalle.load(tmp_path / "encoder.pkl")


@pytest.mark.parametrize("place", range(5), ids=["magic", "version", "machine", "object", "keys"])
def test_code_in_any_pickle_of_the_older_format(tmp_path, place):
    canary, file = tmp_path / "canary", tmp_path / "encoder.pkl"
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"w": 1}, ["0"]]
    parts[place] = Call(os.system, f"touch {canary}")
    file.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(DataError, match="refused"):
        dalle.load(file)
    assert not canary.exists()


def test_code_in_a_class_record_of_the_older_format(tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "encoder.pkl"

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("module", Call(os.system, f"touch {canary}"), "encoder.py", "") if obj == "class" else None

    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        buffer.write(pickle.dumps(part, protocol=2))
    Pickler(buffer, protocol=2).dump({"w": "class"})
    file.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="refused"):
        dalle.load(file)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused(tmp_path, protocol):
    canary, file = tmp_path / "canary", tmp_path / "encoder.pkl"
    file.write_bytes(pickle.dumps(Call(os.system, f"touch {canary}"), protocol=protocol))
    with pytest.raises(DataError):
        dalle.load(file)
    assert not canary.exists()


def program(tmp_path, pickled):
    """A zip file of torch.save's layout around these bytes."""
    file = tmp_path / "encoder.pkl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02c_codecs\nencode\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",  # STACK_GLOBAL takes its names from the stack
        b"\x80\x04\x8c\x0fdall_e.encoder.\x8c\x10Encoder.__init__\x93.",  # a path through an allowed class
        b"(S'true'\niposix\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02c_restricted_pickle\n_Module\n.",
    ],
)
def test_other_ways_to_name_code_are_refused(tmp_path, pickled):
    with pytest.raises(DataError, match="refused"):
        dalle.load(program(tmp_path, pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo slot that would cost 16 GB
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calls what is not callable
        b"\x80\x02cdall_e.encoder\nEncoder\n}b.",  # changes a class instead of an object
        b"\x80\x02cdall_e.encoder\nEncoder\n)\x81.",  # an object without content
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.",  # a tensor without a storage
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string longer than the file
        b"\x80\x02K\x01.",
        b"",
    ],
)
def test_nonsense_is_a_damaged_file(tmp_path, pickled):
    with pytest.raises(DataError, match="damaged"):
        dalle.load(program(tmp_path, pickled))


def test_a_stand_in_cannot_be_changed_for_the_next_file(tmp_path):
    # BUILD with a pair sets attributes: here the defaults of the function that rebuilds tensors
    rebuild = "ctorch._utils\n_rebuild_tensor_v2\n"
    pickled = b"\x80\x02" + rebuild.encode() + b"N}X\x0c\x00\x00\x00__kwdefaults__}s\x86b."
    before = _restricted_pickle._rebuild_tensor.__kwdefaults__
    with pytest.raises(DataError):
        dalle.load(program(tmp_path, pickled))
    assert _restricted_pickle._rebuild_tensor.__kwdefaults__ is before


def rewrite(source, target, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.fixture
def good(tmp_path):
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "good.pt")
    return tmp_path / "good.pt"


def test_tensors_keep_shape_and_stride_and_bits(tmp_path):
    tensors = {
        "transposed": torch.randn(4, 3).T, "part": torch.randn(10)[3:7], "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(), "double": torch.randn(2, 2).double(), "none": torch.zeros(0, 3),
        "scalar": torch.tensor(float("-inf")),
    }  # fmt: skip
    for legacy in (False, True):
        write(tmp_path / "tensors.pt", tensors, legacy)
        found = _restricted_pickle.read(tmp_path / "tensors.pt")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_compressed_entry_is_refused(good, tmp_path):
    rewrite(good, tmp_path / "bomb.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="compressed"):
        _restricted_pickle.read(tmp_path / "bomb.pt")


def test_a_storage_shorter_than_it_says_is_refused(good, tmp_path):
    rewrite(good, tmp_path / "short.pt", lambda name, data: data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(DataError, match="another size"):
        _restricted_pickle.read(tmp_path / "short.pt")


def test_a_tensor_that_reaches_past_its_storage_is_refused(good, tmp_path):
    def stretch(name, data):  # stride 3 becomes 4, so the last element is number 6 of 0 ... 5
        return data.replace(b"K\x03K\x01\x86", b"K\x04K\x01\x86") if name.endswith("data.pkl") else data

    rewrite(good, tmp_path / "past.pt", stretch)
    with pytest.raises(DataError, match="larger than its storage"):
        _restricted_pickle.read(tmp_path / "past.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_many_tensors_of_one_storage_cannot_fill_the_memory(tmp_path, legacy):
    whole = torch.zeros(1000)
    write(tmp_path / "many.pt", {str(i): whole.view(1000) for i in range(100)}, legacy)
    with pytest.raises(DataError, match="larger than the file"):
        _restricted_pickle.read(tmp_path / "many.pt")
