"""Tests of launch/prune.py and launch/quantize.py: results for every family of models, refusals, and interrupted runs."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.command_line import UserError
from launch import export, prune, quantize
from launch.checkpoints import checkpoint, state
from launch.checkpoints.opening import load_weights, open_model
from launch.compressing import layer_store, result
from launch.compressing.layer_store import LayerStore
from launch.compressing.samples import calibration_text
from model import huggingface
from model.compression.statistics import LargestKeysAndValues
from model.config import ModelConfig
from model.layers import Stream
from model.transformer import Transformer
from model.walk import walk
from tests.launch.compressing.conftest import QUICK, SMALL, tensors
from tests.model.both_sides import BERT, GPT2, T5
from tests.ranks import REPOSITORY, clean_environment, finish, start_ranks

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
INT4 = ("--group_size", "32")


def linears(config: ModelConfig) -> set[str]:
    ends = ("query.weight", "key.weight", "value.weight", "output.weight", "gate.weight", "up.weight", "down.weight")
    return {name for name, _ in Transformer(config).named_parameters() if name.endswith(ends)}


def test_pattern_is_exact_and_ignored_matrices_stay_unchanged(pruned, model):
    dense = model("dense")
    folder, status = pruned(dense, "--sparsity", "2:4", "--ignore", "0.*", "*.value")
    assert status == 0
    before, after, config = tensors(dense), tensors(folder), huggingface.load(dense)[0]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in linears(config) if name.startswith("2.") and "value" not in name}  # "0" embeds
    assert all(((after[name].unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all() for name in changed)
    report = json.loads((folder / "report.json").read_text())
    assert {f"{linear['name']}.weight" for linear in report["linears"]} == changed
    zeros = {tensor["name"]: tensor["zeros"] / tensor["parameters"] for tensor in report["after"]["tensors"]}
    assert all(share == 0.5 for name, share in zeros.items() if name in changed) and max(zeros.values()) == 0.5
    assert report["proof"]["measure"] == "perplexity" and report["quality"]["tokens"] == 256


def test_owl_prunes_outlier_blocks_differently_at_the_given_average(pruned, model, capsys):
    def with_outliers(name, weight):
        return weight.index_fill(1, torch.tensor([3]), 9.0) if name.startswith("1.") and weight.ndim == 2 else weight

    outliers = model("outliers", with_outliers)
    folder, status = pruned(outliers, "--method", "sparsegpt", "--sparsity", "0.6", "--allocation", "owl")
    assert status == 0
    after, names = tensors(folder), linears(huggingface.load(folder)[0])
    shares = [
        torch.cat([(after[name] == 0).flatten() for name in names if name.startswith(block)]).double().mean() for block in ("1.", "2.")
    ]
    assert sum(shares) / 2 == pytest.approx(0.6, abs=0.005) and abs(shares[0] - shares[1]) == pytest.approx(0.16, abs=0.01)
    assert "SparseGPT, 0.6, shares by outliers (OWL)" in capsys.readouterr().out


def test_structured_pruning_reduces_every_size_at_once(pruned, model):
    sizes = {"num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 48, "hidden_size": 24}
    options = [option for name, size in sizes.items() for option in (f"--{name}", str(size))]
    folder, status = pruned(model("dense"), "--method", "structured", *options, "--depth_by", "loss")
    config, weights = huggingface.load(folder)
    assert status == 0 and {name: getattr(config, name) for name in sizes} == sizes and config.num_attention_heads == 1
    assert all((weight != 0).any() for weight in weights.values())
    (speed,) = json.loads((folder / "report.json").read_text())["speeds"]
    assert speed["after"] > 0 and speed["before"] > 0


@pytest.mark.parametrize(("options", "measure"), [(BERT | {"num_classes": 2}, "logits"), (T5, "logits")], ids=["bert", "t5"])
def test_encoders_and_encoder_decoders_are_quantized_to_int8(quantized, model, options, measure):
    folder, status = quantized(
        model(f"{measure}{len(options)}", **options), "--bits", "8", "--activations", "int8", "--scaling", "smoothquant"
    )
    config, weights = huggingface.load(folder)
    assert status == 0 and set(weights.schemes) == linears(config)
    report = json.loads((folder / "report.json").read_text())
    assert report["artefact"] == "int-quantized" and report["quality"]["tokens"] > 0 and report["proof"]["measure"] == measure


def test_average_bits_gives_fewer_bits_to_blocks_that_cost_less(quantized, model, capsys):
    """One of three blocks changes nothing, so its compression costs nothing."""
    idle = model(
        "idle",
        lambda name, weight: weight * 1e-6 if name in ("2.attention.output.weight", "2.feed_forward.down.weight") else weight,
        num_layers=3,
    )
    folder, status = quantized(idle, "--average_bits", "6", "--group_size", "0", "--sensitivity_samples", "4", "--precision", "float32")
    bits = {int(name.split(".")[0]) - 1: scheme.grid.bits for name, scheme in huggingface.load(folder)[1].schemes.items()}
    assert status == 0 and bits[1] == 3 and max(bits.values()) == 8
    report = json.loads((folder / "report.json").read_text())
    costs = [block["divergence"] for block in report["blocks"]]
    assert costs[1] < 1e-6 < min(costs[0], costs[2]) and report["bits"] == sorted(set(bits.values()))


def test_group_size_minus_1_is_the_whole_row_and_recorded_as_0(quantized, model):
    folder, status = quantized(model("dense"), "--method", "rtn", "--group_size", "-1")
    report = json.loads((folder / "report.json").read_text())
    assert status == 0 and report["settings"]["group_size"] == 0 and "int4, one scale per row" in report["method"]


def test_cache_scales_are_the_largest_values_of_the_calibration_text(quantized, model):
    folder, status = quantized(model("dense"), "--method", "rtn", *INT4, "--kv_cache", "int8", "--precision", "float32")
    report = json.loads((folder / "report.json").read_text())
    assert status == 0 and report["kv_cache"] == {"kind": "int8", "bytes_before": 512, "bytes_after": 128}
    assert report["proof"]["measure"] == "perplexity" and "launch/generate.py keeps them as int8" in (folder / "report.md").read_text()
    opened = open_model(str(folder))
    seen, network = LargestKeysAndValues(2, torch.device("cpu")), Transformer.from_state(opened.config, opened.state)
    for batch in calibration_text(opened, "dense", [report["settings"]["data"]], 8, None).batches:
        passed = Stream.from_tensors(batch.inputs)
        for step in walk(opened.config, opened.state):
            with seen.watching(step):
                passed = step(passed)
    assert torch.allclose(torch.tensor(opened.kv_cache.scales), seen.sizes / 127.5)
    assert not torch.equal(load_weights(opened).model(*batch.inputs), network(*batch.inputs))
    with pytest.raises(UserError, match=r"is quantized \(int4, one scale per 32; keys and values int8\): GGUF cannot store"):
        export.main([str(folder), "--format", "gguf", "--output", str(folder.parent / "out.gguf")])


def test_classifier_is_pruned_by_magnitude_without_text(pruned, model):
    classifier = model("classifier", **BERT, num_classes=3, token_head=False)
    options = ["--method", "magnitude", "--calibration_samples", "0", "--test_samples", "0"]
    folder, status = pruned(classifier, *options)
    report = json.loads((folder / "report.json").read_text())
    assert status == 0 and report["quality"] is None and report["calibration"] is None and report["proof"]["measure"] == "logits"


def test_averaged_checkpoints_are_calibrated_on_all_data_folders(texts, tmp_path):
    run, second = tmp_path / "run", shutil.copytree(texts, tmp_path / "second")
    config = ModelConfig(**SMALL, document_mask=True)
    recipe = {"model": vars(config), "data": {"path": [str(texts), str(second)], "objective": None}}
    for step in (1, 2):
        beside = checkpoint.begin(run / "checkpoints", step, "id")
        file = checkpoint.HashingFile(beside / "rank_00000.safetensors")
        weights = {name: weight.detach() for name, weight in Transformer(config, seed=step).named_parameters()}
        whole = [state.ShardSlice.of_whole(name, w.shape) for name, w in weights.items()]
        kinds = state.kinds_in({})
        state.write(file, whole, kinds, ((one, dict.fromkeys(kinds, weights[one.name].flatten())) for one in whole))
        checkpoint.write_part(beside, 0, {file.path.name: file.finish()})
        checkpoint.publish(beside, step, {"layout": {"world_size": 1}, "model": recipe["model"], "recipe": recipe, "checksums": {}})
    shutil.copy(texts / "tokenizer.model", run)
    output = tmp_path / "out"
    assert prune.main([str(run), "--output", str(output), "--average", "2", *QUICK, "--calibration_samples", "10"]) == 0
    after = tensors(output)["1.feed_forward.up.weight"]
    mean = sum(Transformer(config, seed=step).get_parameter("1.feed_forward.up.weight").detach() for step in (1, 2)) / 2
    assert torch.equal(after[after != 0], mean[after != 0]) and (after == 0).double().mean() == 0.5
    calibration = json.loads((output / "report.json").read_text())["calibration"]
    assert calibration["samples"] == 10 and str(second) in calibration["text"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (prune, ["--sparsity=1:128"], r"^0\.attention\.query: sparsity 1:128: a row of 32 entries is not a multiple of 128.*--ignore '"),
        (prune, ["--sparsity=1.5"], "sparsity '1.5' is neither"),
        (prune, ["--ignore", "0.*", "1.atention.*"], r"--ignore 1\.atention\.\* matches no matrix\. Did you mean \"1\.attention\.\w+\"\?"),
        (prune, ["--ignore", "*"], r"--ignore \* leaves no matrix"),
        (prune, ["--calibration_samples=0"], r"calibration_samples 0 \(.*\): this method needs statistics of the inputs"),
        (prune, ["--calibration_samples=-1"], "calibration_samples is -1; it must be at least 0"),
        (prune, ["--sequence_length=64"], "--sequence_length 64 must be from 1 to 32, the model's context"),
        (prune, ["--sparsity=2:4", "--allocation=owl"], "allocation owl .* gives blocks different shares"),
        (prune, ["--num_layers=1", "--damping=0.1"],
            r"(?s)num_layers 1 .* only to method structured, not to method wanda \(default\).*damping 0\.1 .* only to method sparsegpt"),
        (prune, ["--method=structured", "--sparsity=0.5", "--ignore", "0.*"],
            "(?s)sparsity 0.5 .* applies only to method magnitude, wanda or.*ignore .* applies only to method"),
        (prune, ["--method=structured"], "Nothing would be removed"),
        (prune, ["--max_perplexity_ratio=2", "--test_samples=0"], "max_perplexity_ratio 2 .* needs a measurement"),
        (prune, ["--data=nowhere"], "nowhere"),
        (quantize, ["--group_size=48"], r"Groups of 48 do not divide .* attention\.query \(32\).*--group_size 32, 16, 0 would divide them"),
        (quantize, ["--kind=nvfp4", "--bits=8"], "nvfp4 has 4 bits"),
        (quantize, ["--kind=fp8", "--bits=4"],
            r"^fp8 has 8 bits, one scale per row, and is symmetric \(got 4 bits, one scale per row\)$"),
        (quantize, ["--activations=fp8"], r"^activations fp8 need kind fp8; got int4, one scale per 128\.$"),
        (quantize, ["--group_size=-2"], "^group_size is -2; it must be at least -1"),
        (quantize, ["--activations=int8"], "activations int8 need kind int, 8 bits"),
        (quantize, ["--average_bits=3", "--group_size=32", "--sensitivity_samples=1"],
            r"average_bits 3 .* must be at least 3\.5, the size of 3-bit"),
        (quantize, ["--average_bits=4", "--bits=4"],
            "(?s)average_bits 4 .* both set the bits.*average_bits 4 .* needs the loss that each block costs"),
        (quantize, ["--method=rtn", "--act_order"], "act_order true .* applies only to method gptq"),
        (quantize, ["--symmetric=false", "--kv_cache=fp8"], "kv_cache fp8 .* needs symmetric weights"),
        (quantize, ["--method=rtn", "--kv_cache=fp8", "--calibration_samples=0"], "kv_cache fp8 .* takes its scales from the calibration"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_before_anything_is_written(texts, model, tmp_path, script, options, message):
    given = ["--data", str(texts), "--output", str(tmp_path / "new" / "out"), *QUICK]
    with pytest.raises(UserError, match=message):
        script.main([str(model("dense")), *given, *options])
    assert not list(tmp_path.iterdir())


def test_existing_output_and_missing_or_unsupported_input_are_named(texts, model, tmp_path):
    dense, output = str(model("dense")), ["--output", str(tmp_path)]
    with pytest.raises(UserError, match=rf"--output {tmp_path} already exists; nothing is overwritten"):
        prune.main([dense, *output])
    with pytest.raises(UserError, match="output is missing"):
        prune.main([dense])
    with pytest.raises(UserError, match=r"does not record its training data\. Give --data, or use no text"):
        prune.main([dense, "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"GPT-2 stores linear weights .* export the model to GGUF"):
        quantize.main([str(model("gpt2", **GPT2)), "--data", str(texts), "--output", str(tmp_path / "out"), *INT4])
    with pytest.raises(UserError, match="kv_cache int8 is supported only for decoders; the architecture is encoder"):
        quantize.main([str(model("bert", **BERT)), "--data", str(texts), "--output", str(tmp_path / "out"), *INT4, "--kv_cache", "int8"])
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_named_with_their_file(pruned, model, tmp_path, texts):
    broken = model("broken", lambda name, weight: weight.index_fill(0, torch.tensor([1]), torch.nan) if "up" in name else weight)
    with pytest.raises(
        UserError,
        match=r"broken/model\.safetensors: 1\.feed_forward\.up\.weight contains numbers that are not finite.* 1 more of its weights",
    ):
        pruned(broken)
    config, weights = huggingface.load(model("dense"))
    sharded = tmp_path / "sharded"
    huggingface.export(config, weights, sharded, max_shard_bytes=40_000)
    shutil.copy(texts / "tokenizer.model", sharded)
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{second} is not a safetensors file"):
        pruned(sharded)
    second.unlink()
    with pytest.raises(UserError, match=f"names {second.name}, which is not a file in"):
        pruned(sharded)
    (sharded / "tokenizer.model").unlink()
    second.write_bytes(whole)
    with pytest.raises(UserError, match=r"no tokenizer\.model, tokenizer\.json or \.tiktoken file next to"):
        pruned(sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_compressed_model_is_compressed_again_only_with_force(pruned, quantized, model):
    once, _ = pruned(model("dense"), "--method", "magnitude", output="once")
    with pytest.raises(
        UserError, match=r"once/model\.safetensors: 50% of 1\.attention\.query\.weight are zero, so the model is pruned already.*--force"
    ):
        quantized(once, *INT4)
    codes, status = quantized(once, "--method", "rtn", *INT4, "--force", output="codes")
    assert status == 0 and (tensors(codes)["1.attention.query.weight"] == 0).double().mean() >= 0.5
    with pytest.raises(UserError, match=r"codes is quantized \(int4, one scale per 32\): compressing it again would add a second loss"):
        pruned(codes)
    again, status = pruned(codes, "--sparsity", "0.75", "--force", output="again")
    before, after = tensors(codes)["1.feed_forward.up.weight"], tensors(again)["1.feed_forward.up.weight"]
    assert status == 0 and torch.equal(after[after != 0], before[after != 0])


def test_calibration_on_the_test_text_is_refused(pruned, model, texts, tmp_path):
    same = shutil.copytree(texts, tmp_path / "same")
    manifest = json.loads((same / "manifest.json").read_text())
    manifest["splits"]["train"] = json.loads(json.dumps(manifest["splits"]["validation"]))
    (same / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"100% of the test text \(validation of .*\) are also in the calibration text .* with --force"):
        pruned(model("dense"), "--calibration_data", str(same), "--calibration_samples", "1000")
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_few_tokens_are_noted_and_dry_run_writes_nothing(pruned, quantized, model, texts, tmp_path, capsys):
    assert prune.main([str(model("dense")), "--data", str(texts), *QUICK, "--calibration_samples", "1", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "Note: 32 calibration tokens for matrices of up to 64 inputs" in printed
        and "14 matrices in 2 blocks; 32 calibration tokens" in printed
    )
    assert quantize.main(["llama2-7b", "--dry_run"]) == 0
    assert "llama2-7b: 6,738,415,616 parameters, 224 matrices in 32 blocks; 262,144 calibration tokens" in capsys.readouterr().out
    assert prune.main(["llama2-7b", "--dry_run", "--method", "structured", "--parameters", "0.75"]) == 0
    assert "intermediate_size 11008 -> " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"Groups of 96 do not divide the inputs of attention\.query \(4096\)"):
        quantize.main(["llama2-7b", "--dry_run", "--group_size", "96"])
    assert not list(tmp_path.iterdir())


def test_exceeded_limits_set_the_exit_status_and_keep_the_folder(quantized, model, capsys):
    silent = model("silent", lambda name, weight: weight * 0 if name == "2.attention_norm.weight" else weight)
    folder, status = quantized(silent, "--bits", "2", *INT4, "--max_perplexity_ratio", "0.5", "--strict", output="three")
    assert status == 3 and "is above --max_perplexity_ratio 0.5" in capsys.readouterr().err and (folder / "config.json").is_file()
    folder, status = quantized(silent, *INT4, "--strict", output="one")
    assert status == 1 and "--strict: 4 matrices were not compressed as requested, first 2.attention.query" in capsys.readouterr().err
    assert "the Hessian could not be inverted" in (folder / "report.md").read_text()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


AWQ = ("--scaling", "awq", *INT4, "--average_bits", "4.6", "--sensitivity_samples", "4", "--kv_cache", "fp8")


@pytest.fixture
def whole(quantized, model, one_thread) -> bytes:
    """Return the weights that an uninterrupted command writes."""
    folder, status = quantized(model("dense"), *AWQ, output="whole")
    assert status == 0
    return (folder / "model.safetensors").read_bytes()


def test_full_disk_at_each_write_loses_no_finished_layer(quantized, model, whole, tmp_path, monkeypatch):
    save_file, export = layer_store.save_file, huggingface.export
    written, unfinished = [], tmp_path / "out.unfinished"

    def save_one(tensors, path):
        if written and written[-1] != "full":
            written.append("full")
            raise FULL
        written.append(path.name)
        save_file(tensors, path)

    monkeypatch.setattr(layer_store, "save_file", save_one)
    for layer in range(1, 5):
        with pytest.raises(
            UserError, match=rf"layer-{layer:05d}\.safetensors could not be written: .*No space left.*kept; the same command"
        ):
            quantized(model("dense"), *AWQ)
        assert not list(unfinished.glob("*.tmp"))
        if layer == 1:
            with pytest.raises(UserError, match=r"out\.unfinished was started by another command"):
                quantized(model("dense"), *AWQ, "--damping", "0.02")
            with pytest.raises(UserError, match="was started by another command, or by this one with another model or text"):
                quantized(model("outliers", lambda name, weight: weight + 0.01), *AWQ)

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(huggingface, "export", full)
    with pytest.raises(UserError, match=r"out could not be written: No space left on device. The finished layers are kept in"):
        quantized(model("dense"), *AWQ)
    assert [name for name in written if name != "full"] == [f"layer-{layer:05d}.tmp" for layer in range(5)]
    monkeypatch.setattr(huggingface, "export", export)
    folder, status = quantized(model("dense"), *AWQ)
    assert status == 0 and (folder / "model.safetensors").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_too_small_disk_is_refused_and_finished_layers_are_subtracted(quantized, model, tmp_path, monkeypatch):
    needed = 2 * 2 * 39_840
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=rf"{tmp_path} has 155.62 KiB free; --output {tmp_path}/out needs 155.62 KiB"):
        quantized(model("dense"), *INT4)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "layer-00000.safetensors").write_bytes(b"done")
    with pytest.raises(UserError, match="is not an unfinished compression"):  # the next check
        quantized(model("dense"), *INT4)


def test_output_is_locked_and_foreign_folders_are_refused(quantized, model, tmp_path):
    store = LayerStore(tmp_path / "out", {})
    store.open()
    for leftover in ("whole", ".whole.a1b2c3d4"):
        (store.folder / leftover).mkdir()
    store.close()
    store.open()
    assert sorted(path.name for path in store.folder.iterdir()) == ["lock", "plan.json"]
    with pytest.raises(UserError, match=r"Another process is writing .*out\.unfinished"):
        quantized(model("dense"), *INT4)
    store.close()
    (tmp_path / "mine.unfinished").mkdir()
    (tmp_path / "mine.unfinished" / "thesis.txt").write_text("of years")
    with pytest.raises(UserError, match=r"mine\.unfinished is not an unfinished compression"):
        quantized(model("dense"), *INT4, output="mine")
    assert [path.name for path in (tmp_path / "mine.unfinished").iterdir()] == ["thesis.txt"]


def test_different_perplexity_by_transformers_is_an_error(quantized, model, tmp_path, monkeypatch):
    ours = result.perplexity_of
    monkeypatch.setattr(result, "perplexity_of", lambda *arguments: 1.00003 * ours(*arguments))
    with pytest.raises(RuntimeError, match=r"the perplexity by transformers is .*, ours is .*\. They differ by more than 1e-05 of ours"):
        quantized(model("dense"), *INT4)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


KILLED = """
import os, signal, sys
from launch import quantize
from launch.compressing import layer_store
save_file = layer_store.save_file
def die_while_writing(tensors, path):
    if "00002" in path.name:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path)
layer_store.save_file = die_while_writing
quantize.main(sys.argv[1:])
"""


def test_two_ranks_resume_a_killed_process_to_the_same_bytes(texts, model, whole, tmp_path):
    options = [str(model("dense")), "--data", str(texts), "--output", str(tmp_path / "out"), *QUICK, *AWQ]
    environment = clean_environment(OMP_NUM_THREADS="1")
    died = subprocess.run([sys.executable, "-c", KILLED, *options], env=environment, cwd=REPOSITORY, capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    first, second = finish(start_ranks(2, REPOSITORY / "launch" / "quantize.py", *options, OMP_NUM_THREADS="1"))
    assert "Resuming after layer 2 of an earlier start" in first and second.strip() == ""
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert Path(tmp_path / "out" / "report.md").is_file() and not (tmp_path / "out.unfinished").exists()
