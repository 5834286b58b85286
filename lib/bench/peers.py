"""PyTorch and transformers as peers of `ropewalk bench`: one process, kept running, that alternates with ours.

One JSON request a line on stdin, one JSON answer a line on stdout:

    {"do": "hello"}                                  -> {"python": ..., "torch": ..., "transformers": ...}
    {"do": "setup", "case": {"op": ...}, "threads"}  -> {"variants": [...]}
    {"do": "run", "variant": ..., "repeats": n}      -> {"seconds": ...}
    {"do": "drop"}                                   -> {}

An answer may be {"error": ...} instead. The process ends with its stdin.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time


def version(package):
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.metadata.version(package)


def matmul(torch, case):
    m, n, k = case["m"], case["n"], case["k"]
    a = torch.rand(k, m).t() if case["layout"] == "tn" else torch.rand(m, k)
    b = torch.rand(n, k).t() if case["layout"] == "nt" else torch.rand(k, n)
    c = torch.empty(m, n)
    return {"torch": lambda: torch.mm(a, b, out=c)}


def attention(torch, case):
    shape = (1, case["heads"], case["time"], case["headDim"])
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        return attend(q, k, v, is_causal=True)

    if case["mode"] == "fwd":
        return {"torch": torch.no_grad()(forward)}
    for x in (q, k, v):
        x.requires_grad_()
    if case["mode"] == "bwd":
        o = forward()
        return {"torch": lambda: torch.autograd.grad(o, (q, k, v), dout, retain_graph=True)}
    return {"torch": lambda: torch.autograd.grad(forward(), (q, k, v), dout)}


def with_backward(torch, mode, inputs, forward):
    """The forward pass, or the backward pass of a recorded forward one."""
    if mode == "fwd":
        return {"torch": torch.no_grad()(forward)}
    for x in inputs:
        x.requires_grad_()
    y = forward()
    dy = torch.randn_like(y)
    return {"torch": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)}


def rmsnorm(torch, case):
    x, w = torch.randn(case["rows"], case["channels"]), torch.rand(case["channels"])
    norm = torch.nn.functional.rms_norm
    return with_backward(torch, case["mode"], (x, w), lambda: norm(x, w.shape, w, 1e-5))


def swiglu(torch, case):
    gate, up = torch.randn(case["size"]), torch.randn(case["size"])
    silu = torch.nn.functional.silu
    return with_backward(torch, case["mode"], (gate, up), lambda: silu(gate) * up)


def cross_entropy(torch, case):
    x = torch.randn(case["rows"], case["channels"], requires_grad=True)
    w = (0.02 * torch.randn(case["vocabulary"], case["channels"])).requires_grad_()
    labels = torch.randint(0, case["vocabulary"], (case["rows"],))

    def run():
        loss = torch.nn.functional.cross_entropy(x @ w.t(), labels)
        return torch.autograd.grad(loss, (x, w))

    return {"torch": run}


def adamw(torch, case):
    # One tensor a million elements, about as many tensors as a model has.
    sizes = [1 << 20] * (case["size"] >> 20) or [case["size"]]
    parameters = [torch.nn.Parameter(0.02 * torch.randn(size)) for size in sizes]
    for p in parameters:
        p.grad = 0.01 * torch.randn_like(p)
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0}
    fused = torch.optim.AdamW(parameters, fused=True, **options)
    foreach = torch.optim.AdamW(parameters, foreach=True, **options)
    return {"torch fused": fused.step, "torch foreach": foreach.step}


def step(torch, case):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**case["config"], attn_implementation="sdpa", use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
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


CASES = {
    "matmul": matmul,
    "attention": attention,
    "rmsnorm": rmsnorm,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
    "step": step,
}


def main():
    # What libraries print goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    versions = {"python": sys.version.split()[0], "torch": version("torch"), "transformers": version("transformers")}
    variants = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            do = request["do"]
            if do == "hello":
                answer = versions
            elif do == "setup":
                import torch

                torch.set_num_threads(request["threads"])
                torch.manual_seed(0)
                variants = CASES[request["case"]["op"]](torch, request["case"])
                answer = {"variants": list(variants)}
            elif do == "run":
                run = variants[request["variant"]]
                start = time.perf_counter()
                for _ in range(request["repeats"]):
                    run()
                answer = {"seconds": time.perf_counter() - start}
            else:
                variants = {}
                answer = {}
        except Exception as error:  # a peer that fails is left out, with the reason
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


main()
