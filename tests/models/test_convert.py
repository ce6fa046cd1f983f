"""Conversion: what is written, that many may do it at once, and what a broken source says."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants
from tokenizers import Tokenizer

from baton.core.errors import SetupError
from baton.core.once import locked
from baton.models.convert import ModelFiles, convert, open_converted
from baton.models.weights import load_weights
from tests.models.gguf_writer import Quant, write_gguf
from tests.models.reference import TinyLlama, every_logit, open_runner, transformers_logits, write_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(Hugging Face directory, transformers' model) with rows of 32, which quantised types need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(5)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rope_theta=5000.0, initializer_range=0.3,
            rms_norm_eps=1e-5)).eval()
        directory = tmp_path_factory.mktemp("source") / "llama"
        model.save_pretrained(directory)
    write_tiny_llama(tokenizer := directory / "other", TinyLlama())
    (tokenizer / "tokenizer.json").rename(directory / "tokenizer.json")
    shutil.rmtree(tokenizer)
    return directory, model


def broken_copy(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a directory with settings of its JSON file `name` changed."""
    shutil.copytree(source, target)
    document = json.loads((target / name).read_text()) if (target / name).exists() else {}
    (target / name).write_text(json.dumps(document | changes))
    return target


def test_a_gguf_file_and_a_directory_of_the_same_model_have_the_same_weights(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    """Q and K rows are in another order in GGUF: undone here, or every weight of them would differ."""
    directory, model = llama
    write_gguf(tmp_path / "m.gguf", model)
    one, other = convert(directory, tmp_path / "c"), convert(tmp_path / "m.gguf", tmp_path / "c")
    assert one.spec == other.spec
    mine, theirs = (load_weights(files.directory / "weights.safetensors") for files in (one, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    attention = model.model.layers[1].self_attn
    q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    assert torch.equal(mine["layers.1.qkv"], torch.cat([q, k, v]))


def test_quantised_gguf_tensors_run_as_their_expanded_values(llama: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = llama
    types = {"token_embd": Quant.Q8_0, "ffn_gate": Quant.Q4_1, "attn_v": Quant.Q4_1, "ffn_down": Quant.Q8_0}
    write_gguf(tmp_path / "m.gguf", model, types)
    files = convert(tmp_path / "m.gguf", tmp_path / "cache")
    rounded = {"embed_tokens": Quant.Q8_0, "gate_proj": Quant.Q4_1, "v_proj": Quant.Q4_1, "down_proj": Quant.Q8_0}
    expected = type(model)(model.config).eval()
    state = model.state_dict()
    for name, weight in state.items():
        for part, kind in rounded.items():
            if part in name:
                state[name] = torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))
    expected.load_state_dict(state)
    tokens = [1, 5, 9, 40, 63, 2, 2, 8]
    with open_runner(files.directory, 2) as runner:
        ours = every_logit(runner, tokens, (1,))
    torch.testing.assert_close(ours, transformers_logits(expected, tokens), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours, transformers_logits(model, tokens), atol=1e-3), "quantising must show"


def test_bfloat16_weights_are_widened_exactly(llama: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = llama
    shutil.copytree(directory, tmp_path / "bf16")
    type(model)(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    weights = load_weights(convert(tmp_path / "bf16", tmp_path / "cache").directory / "weights.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert torch.equal(weights["embed"], weights["embed"].bfloat16().float())


def test_a_directory_holds_what_router_and_workers_read(llama: tuple[Path, Any], tmp_path: Path) -> None:
    _, model = llama
    write_gguf(tmp_path / "tiny.Q8.gguf", model)
    files = convert(tmp_path / "tiny.Q8.gguf", tmp_path / "cache")
    document = json.loads((files.directory / "config.json").read_text())
    assert (document["eos_token_ids"], document["bos_token_id"], document["max_model_len"]) == ([2], 1, 128)
    assert (document["vocab_size"], document["fingerprint"]) == (64, files.fingerprint)
    assert (files.directory / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    tokenizer = Tokenizer.from_file(str(files.directory / "tokenizer.json"))
    tokens = tokenizer.encode("<|im_start|>XabY<|im_end|>").tokens
    assert tokens == ["<|im_start|>", "X", "ab", "Y", "<|im_end|>"]
    assert files.name == "tiny.Q8"
    assert open_converted(files.directory) == files


def test_weights_are_mapped_not_copied(tiny_model_dir: Path) -> None:
    """Each tensor lies in a mapping of the file, and none of its pages is private memory of this process."""
    path = tiny_model_dir / "weights.safetensors"
    weights = load_weights(path)
    assert sum(float(w.sum()) for w in weights.values())  # read every page
    starts = {name: w.data_ptr() for name, w in weights.items()}
    mapping, anonymous = range(0), {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and ":" not in head:
            low, high = (int(x, 16) for x in head.split("-"))
            mapping = range(low, high) if rest[-1] == str(path) else range(0)
        elif head == "Anonymous:":
            anonymous |= {name: int(rest[0]) for name, start in starts.items() if start in mapping}
    assert anonymous == dict.fromkeys(starts, 0)
    assert min(starts.values()) % 64 == 0


def test_the_fingerprint_is_the_content(llama: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = llama
    first = convert(directory, tmp_path / "a")
    moved = shutil.copytree(directory, tmp_path / "elsewhere")
    assert convert(moved, tmp_path / "b").fingerprint == first.fingerprint
    other_theta = broken_copy(directory, tmp_path / "theta", "config.json", rope_parameters={"rope_theta": 1.0})
    other_weight = shutil.copytree(directory, tmp_path / "weight")
    raw = bytearray((other_weight / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other_weight / "model.safetensors").write_bytes(raw)
    seen = {first.fingerprint, *(convert(d, tmp_path / "c").fingerprint for d in (other_theta, other_weight))}
    assert len(seen) == 3
    assert all(len(f) == 32 and int(f, 16) >= 0 for f in seen)


def test_a_second_conversion_finds_the_first_and_a_changed_source_is_converted_again(
    llama: tuple[Path, Any], tmp_path: Path
) -> None:
    source = shutil.copytree(llama[0], tmp_path / "m")
    told: list[str] = []
    first = convert(source, tmp_path / "cache", told.append)
    assert convert(source, tmp_path / "cache", told.append) == first
    assert told == ["converting m"]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    second = convert(source, tmp_path / "cache", told.append)
    assert second.spec.eos_token_ids == (3, 2)
    assert second.directory != first.directory


@pytest.mark.parametrize("damage", ["weights.safetensors", "config.json"])
def test_an_incomplete_directory_is_built_again(llama: tuple[Path, Any], tmp_path: Path, damage: str) -> None:
    first = convert(llama[0], tmp_path)
    raw = (first.directory / damage).read_bytes()
    (first.directory / damage).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SetupError, match="not a complete converted model"):
        open_converted(first.directory)
    left_by_a_crash = first.directory.with_name(first.directory.name + ".building")
    left_by_a_crash.mkdir()
    (left_by_a_crash / "weights.safetensors").write_bytes(b"half")
    assert convert(llama[0], tmp_path) == first
    assert (first.directory / damage).read_bytes() == raw
    assert not left_by_a_crash.exists()


def _convert_and_tell(source: Path, cache: Path, barrier: Any, answers: Any) -> None:
    barrier.wait(60)
    told: list[str] = []
    answers.put((convert(source, cache, told.append), told))


@pytest.mark.slow
def test_processes_that_convert_at_once_share_one_conversion(llama: tuple[Path, Any], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    work = (llama[0], tmp_path, barrier, answers)
    processes = [context.Process(target=_convert_and_tell, args=work) for _ in range(3)]
    for process in processes:
        process.start()
    found: list[tuple[ModelFiles, list[str]]] = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert len({files for files, _ in found}) == 1
    assert sum(len(told) for _, told in found) == 1, "only one of them converts"


def test_a_lock_that_is_never_given_up_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "x.lock", "nothing"),
        pytest.raises(SetupError, match="waited 0 s for the other one"),
        locked(tmp_path / "x.lock", "the other one", timeout_s=0.1),
    ):
        pass


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.9999])
def test_a_gguf_file_cut_short_says_so_wherever_it_ends(llama: tuple[Path, Any], tmp_path: Path, share: float) -> None:
    write_gguf(tmp_path / "whole.gguf", llama[1])
    raw = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(SetupError, match=r"cut\.gguf is cut short or damaged .*Fetch the model again"):
        convert(tmp_path / "cut.gguf", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"], "half done"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'; Baton runs 'llama' so far"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its rotary embedding .'yarn'."),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer of kind 'bert'"),
    ],
)
def test_a_gguf_file_that_cannot_run_yet_is_refused_by_name(
    llama: tuple[Path, Any], tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the writer on keys written twice
        write_gguf(tmp_path / "m.gguf", llama[1], **changes)
    with pytest.raises(SetupError, match=says):
        convert(tmp_path / "m.gguf", tmp_path / "cache")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(SetupError, match="is not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM'"),
        ({"attention_bias": True}, "attention_bias, which is not supported yet"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope scaling .*llama3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "4 heads do not share 3 KV heads"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_hidden_layers": 3}, "no safetensors file holds model.layers.2"),
        ({"intermediate_size": 95}, "layers.0.gate has shape"),
        ({"eos_token_id": 64}, "end tokens"),
        ({"num_hidden_layers": "two"}, "config.json is damaged"),
    ],
    ids=str,
)
def test_a_directory_that_cannot_run_is_refused_by_what_is_wrong(
    llama: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    source = broken_copy(llama[0], tmp_path / "m", "config.json", **changes)
    (source / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(SetupError, match=says):
        convert(source, tmp_path / "cache")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_with_a_file_missing_names_it(llama: tuple[Path, Any], tmp_path: Path, missing: str) -> None:
    source = shutil.copytree(llama[0], tmp_path / "m")
    (source / missing).unlink()
    with pytest.raises(SetupError, match=f"{missing} is missing"):
        convert(source, tmp_path / "cache")


def test_a_safetensors_file_cut_short_says_so(llama: tuple[Path, Any], tmp_path: Path) -> None:
    source = shutil.copytree(llama[0], tmp_path / "m")
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(raw[:-100])
    with pytest.raises(SetupError, match="cut short or damaged"):
        convert(source, tmp_path / "cache")


def test_an_index_of_shards_cannot_point_outside_the_directory(llama: tuple[Path, Any], tmp_path: Path) -> None:
    source = shutil.copytree(llama[0], tmp_path / "m")
    index = {"weight_map": {"model.embed_tokens.weight": "../../secret.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SetupError, match=f"{source}/secret.safetensors is missing"):
        convert(source, tmp_path / "cache")
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SetupError, match="index.json is damaged: weight_map"):
        convert(source, tmp_path / "cache")


def test_a_part_is_written_where_its_name_says(tiny_model_dir: Path) -> None:
    """The file is ours, so read it with somebody else's reader."""
    from safetensors.numpy import load_file

    theirs = load_file(tiny_model_dir / "weights.safetensors")
    ours = load_weights(tiny_model_dir / "weights.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name].numpy()) for name in ours)
