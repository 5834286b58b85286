"""PyTorch and transformers as peers of `ropewalk bench`: one process, kept running, that alternates with ours.

One JSON request a line on stdin, one JSON answer a line on stdout:

    {"do": "hello", "device"}                                  -> {"python", "torch", "transformers", "cuda", "cublaslt"}
    {"do": "setup", "case": {"op": ...}, "device", "threads"}  -> {"id": n, "variants": [...], "failed": [...]}
    {"do": "run", "id": n, "variant": ..., "repeats": n}       -> {"seconds": ...}
    {"do": "drop", "id": n}                                    -> {}

A case may say in which "dtype" it is (default f32), and how many "sets" of tensors its repeats use in turn, so that none
finds its own in a cache (default 1). Every variant runs once at setup; those that cannot are named in "failed". An answer
may be {"error": ...} instead. The process ends with its stdin.
"""

import contextlib
import gc
import glob
import importlib.metadata
import importlib.util
import json
import os
import sys
import time

torch = None
device = "cpu"
dtype = None


def version(package):
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.metadata.version(package)


def hello(request):
    """Versions; on a GPU also that PyTorch sees it."""
    cuda = None
    if request["device"].startswith("cuda"):
        if version("torch") is None:
            raise RuntimeError("there is no torch")
        load(request["device"])
        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA device")
        cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
        "cuda": cuda,
        "cublaslt": cublaslt(),
    }


def cublaslt():
    """Files of cuBLASLt that PyTorch's packages brought along."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found else []
    return sorted(path for folder in folders for path in glob.glob(f"{folder}/*/lib/libcublasLt.so.*"))


def load(name, threads=1):
    """Imports PyTorch, once; what is made from now on is on this device."""
    global torch, device
    import torch as module

    torch, device = module, name
    torch.set_default_device(name)
    if name == "cpu":
        torch.set_num_threads(threads)


def on_gpu():
    return device.startswith("cuda")


def rand(*shape):
    return torch.rand(*shape, dtype=dtype)


def randn(*shape, like=None):
    return torch.randn(*shape, dtype=like or dtype)


def matmul(case):
    m, n, k = case["m"], case["n"], case["k"]
    a = randn(k, m).t() if case["layout"] == "tn" else randn(m, k)
    b = randn(n, k).t() if case["layout"] == "nt" else randn(k, n)
    c = torch.empty(m, n, dtype=dtype)

    def run():
        torch.mm(a, b, out=c)

    if not on_gpu():
        return {"torch": run}

    def through(library):
        torch.backends.cuda.preferred_blas_library(library)
        run()

    return {"cublas": lambda: through("cublas"), "cublaslt": lambda: through("cublaslt")}


def attention(case):
    heads, kv_heads = case["heads"], case["kvHeads"]

    def tensor(count):  # in the order that ours has: a row of all heads for each token
        return randn(case["batch"], case["time"], count, case["headDim"]).transpose(1, 2)

    q, k, v, dout = tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads)
    grouped = {"enable_gqa": True} if kv_heads < heads else {}

    def with_backend(backend):
        if backend is None:
            restrict = contextlib.nullcontext
        else:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            def restrict():
                return sdpa_kernel(getattr(SDPBackend, backend))

        def forward():
            with restrict():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)

        if case["mode"] == "fwd":
            return torch.no_grad()(forward)
        for x in (q, k, v):
            x.requires_grad_()
        if case["mode"] == "bwd":
            o = forward()
            return lambda: torch.autograd.grad(o, (q, k, v), dout, retain_graph=True)
        return lambda: torch.autograd.grad(forward(), (q, k, v), dout)

    if not on_gpu():
        return {"torch": with_backend(None)}
    return {"flash": with_backend("FLASH_ATTENTION"), "cudnn": with_backend("CUDNN_ATTENTION")}


def with_backward(mode, inputs, forward):
    """The forward pass, or the backward pass of a recorded forward one."""
    if mode == "fwd":
        return {"torch": torch.no_grad()(forward)}
    for x in inputs:
        x.requires_grad_()
    y = forward()
    dy = torch.randn_like(y)
    return {"torch": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)}


def rmsnorm(case):
    x, w = randn(case["rows"], case["channels"]), rand(case["channels"])
    norm = torch.nn.functional.rms_norm
    return with_backward(case["mode"], (x, w), lambda: norm(x, w.shape, w, 1e-5))


def swiglu(case):
    gate, up = randn(case["size"]), randn(case["size"])
    silu = torch.nn.functional.silu
    return with_backward(case["mode"], (gate, up), lambda: silu(gate) * up)


def cross_entropy(case):
    x = randn(case["rows"], case["channels"]).requires_grad_()
    w = (0.02 * randn(case["vocabulary"], case["channels"])).requires_grad_()
    labels = torch.randint(0, case["vocabulary"], (case["rows"],))

    def run():
        loss = torch.nn.functional.cross_entropy((x @ w.t()).float(), labels)
        return torch.autograd.grad(loss, (x, w))

    return {"torch": run}


def embedding(case):
    w = randn(case["vocabulary"], case["channels"])
    ids = torch.randint(0, case["vocabulary"], (case["rows"],))
    return with_backward(case["mode"], (w,), lambda: torch.nn.functional.embedding(ids, w))


def adamw(case):
    # One tensor a million elements, about as many tensors as a model has.
    sizes = [1 << 20] * (case["size"] >> 20) or [case["size"]]
    parameters = [torch.nn.Parameter(0.02 * randn(size)) for size in sizes]
    for p in parameters:
        p.grad = 0.01 * torch.randn_like(p)
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0}
    fused = torch.optim.AdamW(parameters, fused=True, **options)
    if on_gpu():  # one is enough: another one's moments are memory
        return {"torch fused": fused.step}
    foreach = torch.optim.AdamW(parameters, foreach=True, **options)
    return {"torch fused": fused.step, "torch foreach": foreach.step}


def copy(case):
    x = randn(case["size"])
    y = torch.empty_like(x)
    return {"torch": lambda: y.copy_(x)}


def step(case):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    settings = {**case["config"], "max_position_embeddings": max(case["time"], case["config"]["max_position_embeddings"])}
    config = transformers.LlamaConfig(**settings, attn_implementation="sdpa", use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ids = torch.randint(0, config.vocab_size, (1, case["time"]))

    def run():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"transformers": run}


def evaluate(case):
    """A window of which the last tokens are scored: as documented, and with no other logits computed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**case["config"], attn_implementation="sdpa", use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()
    ids = torch.randint(0, config.vocab_size, (1, case["window"]))
    labels = ids.clone()
    labels[:, : -case["stride"]] = -100

    @torch.no_grad()
    def whole():
        return model(input_ids=ids, labels=labels).loss.item()

    @torch.no_grad()
    def kept():
        logits = model(input_ids=ids, logits_to_keep=case["stride"] + 1).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), ids[0, -case["stride"] :]).item()

    return {"transformers": kept, "transformers, all logits": whole}


CASES = {
    "matmul": matmul,
    "attention": attention,
    "rmsnorm": rmsnorm,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "embedding": embedding,
    "adamw": adamw,
    "copy": copy,
    "step": step,
    "eval": evaluate,
}


def synchronize():
    if on_gpu():
        torch.cuda.synchronize()


def free():
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def setup(request):
    """By variant, its ways to run, one for each set of tensors; and what cannot run, with the reason."""
    global dtype
    load(request["device"], request["threads"])
    torch.manual_seed(0)
    case = request["case"]
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[case.get("dtype", "f32")]
    sets = [CASES[case["op"]](case) for _ in range(case.get("sets", 1))]
    variants, failed = {}, []
    for name in sets[0]:
        try:
            runs = [one[name] for one in sets]
            for run in runs[:1] if on_gpu() else []:  # the CPU's variants are those of every release
                run()
            synchronize()
            variants[name] = runs
        except Exception as error:
            failed.append(f"{name}: {error}".split("\n")[0])
    if failed:
        free()  # what it had reserved when memory ended
    return variants, failed


def timed(runs, repeats):
    """Seconds of `repeats` runs: between two events on a GPU, by the clock on the CPU."""
    if on_gpu():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(repeats):
            runs[i % len(runs)]()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    for i in range(repeats):
        runs[i % len(runs)]()
    return time.perf_counter() - start


def main():
    # What libraries print goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cases = {}
    count = 0
    for line in sys.stdin:
        request = json.loads(line)
        do = request["do"]
        try:
            if do == "hello":
                answer = hello(request)
            elif do == "setup":
                variants, failed = setup(request)
                count += 1
                cases[count] = variants
                answer = {"id": count, "variants": list(variants), "failed": failed}
            elif do == "run":
                answer = {"seconds": timed(cases[request["id"]][request["variant"]], request["repeats"])}
            else:
                cases.pop(request["id"], None)
                variants = None
                free()
                answer = {}
        except Exception as error:  # a peer that fails is left out, with the reason
            variants = None
            answer = {"error": f"{type(error).__name__}: {error}"}
        if "error" in answer and do != "hello":
            free()
        answers.write(json.dumps(answer) + "\n")


main()
