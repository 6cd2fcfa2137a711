"""64 processes of an 8 B model on one machine: built, cut and traced, and nothing is allocated."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

SEQ_LEN = 8192


def trace(shard: int, tensor: int) -> dict[str, float]:
    """One step of rank 0 with torch's fake process group and fake tensors; bytes it holds."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gristmill.config.sections import AdamW
    from gristmill.models import zoo
    from gristmill.models.counts import activation_bytes, num_parameters, state_bytes
    from gristmill.models.decoder import Decoder
    from gristmill.optim.build import build_optimizer
    from gristmill.parallel.gradients import local, total_norm
    from gristmill.parallel.mesh import build_mesh
    from gristmill.parallel.parallelize import parallelize
    from gristmill.parallel.weights import materialize

    cpu, config = torch.device("cpu"), zoo.get("Llama-3-8B")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    sizes = {"replicate": 1, "shard": shard, "context": 1, "tensor": tensor}
    mesh = build_mesh(sizes, 0, cpu)
    with torch.device("meta"):
        model = Decoder(config)
    parallelize(model, mesh, cpu, compile="off", precision="bf16-mixed")
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model, cpu)
        optimizer = build_optimizer(model, AdamW(), cpu)
        tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = model(tokens, tokens) / SEQ_LEN
        weights = {local(p).untyped_storage()._cdata for p in model.parameters()}
        # Blocks that were put together are given back by now: their storage is empty.
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in saved}
        activations = sum(s.nbytes() for key, s in storages.items() if key not in weights)
        saved.clear()
        loss.backward()
        norm = total_norm(model)
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1.0), torch.zeros(())
        optimizer.step()
        tensors = [t for p in model.parameters() for t in (p, p.grad)]
        tensors += [t for state in optimizer.state.values() for t in state.values()]
        state = sum(local(t).nbytes for t in tensors)
    dist.destroy_process_group()
    return {
        "parameters": num_parameters(config),
        "state": state,
        "state_formula": state_bytes(config, "bf16-mixed", sizes),
        "activations": activations,
        "activations_formula": activation_bytes(config, 1, SEQ_LEN, "bf16-mixed", sizes=sizes),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@pytest.mark.parametrize(("shard", "tensor"), [(64, 1), (8, 8)])
def test_64_ranks_of_llama_3_8b_hold_what_the_formula_says(shard, tensor):
    command = [sys.executable, __file__, str(shard), str(tensor)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == 8_030_261_248
    assert found["state"] == pytest.approx(found["state_formula"], rel=0.1)
    assert found["state"] == pytest.approx(16 * found["parameters"] / 64, rel=0.01)
    assert found["activations"] == pytest.approx(found["activations_formula"], rel=0.1)
    assert found["resident"] < 2e9


if __name__ == "__main__":
    print(json.dumps(trace(*map(int, sys.argv[1:]))))
