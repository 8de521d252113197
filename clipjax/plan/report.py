"""The text of a plan."""

from collections.abc import Iterator, Mapping

from clipjax.plan.estimate import COLLECTIVES, Compiler
from clipjax.plan.figures import Plan
from clipjax.plan.search import Try
from clipjax.train.remat import Choice

LISTED = 10  # of the tensors that every device has in full, at most
BAR = 40  # characters of a bar for the whole step
MEANING = {
    "compute": "matrix products at the bfloat16 peak",
    "memory": "reads and writes of the chip's memory",
    "links": "bytes sent to other chips of the slice",
    "network": "bytes sent to other slices",
}


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "unknown"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def axes(mesh: Mapping[str, int]) -> str:
    """The axes of a mesh that have more than one device."""
    return ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"


def batch_line(size: int, micro_batches: int, remat: Choice, share: str = "") -> str:
    """The batch in a line. `share`: goes after the number of pairs."""
    parts = f", in {micro_batches} micro-batches" if micro_batches > 1 else ""
    return f"batch: {size:,} pairs{share}{parts}; model.remat: {remat}"


def lines(plan: Plan) -> Iterator[str]:
    slices = f" in {plan.slices} slices" if plan.slices > 1 else ""
    halves = f", {plan.devices // plan.chips} devices each" if plan.devices > plan.chips else ""
    yield f"{plan.topology}: {plan.chips:,} chips{slices} ({plan.device_kind}{halves}); mesh: {axes(plan.mesh)}"
    chosen = Choice(plan.remat, plan.part, plan.remat_reason)
    yield batch_line(plan.batch_size, plan.micro_batches, chosen, f", {plan.batch_size / plan.chips:,.6g} a chip")
    yield from _memory(plan)
    yield from _sharding(plan)
    yield from _work(plan)
    yield from _estimate(plan)
    if plan.tries:
        found = "none fits" if plan.largest_batch is None else f"{plan.largest_batch:,} pairs"
        yield f"\nLargest batch with train.micro_batches = {plan.micro_batches}: {found}"


def _memory(plan: Plan) -> Iterator[str]:
    yield "\nMemory a chip"
    for kind, count in plan.memory.items():
        yield f"  {kind:<18} {size(count):>12}"
    if plan.fits:
        yield f"  {'peak':<18} {size(plan.peak_bytes_per_chip):>12} of {size(plan.capacity_bytes)}: fits"
    else:
        yield f"  out of memory: needs {size(plan.peak_bytes_per_chip)}, has {size(plan.capacity_bytes)}"
    for lack in plan.memory_lacks:
        yield f"  leaves out {lack}"


def _sharding(plan: Plan) -> Iterator[str]:
    share = f"{plan.sharded_fraction:.1%} of {size(plan.state_bytes)}"
    if plan.devices == 1:
        return
    yield f"\nSharded: {share} of weights and optimizer state; tensors over 1 MB that a chip has in full: " + (
        f"{len(plan.unsharded)}" if plan.unsharded else "none"
    )
    for tensor in plan.unsharded[:LISTED]:
        yield f"  {tensor['name']:<60} {size(tensor['bytes']):>12} {tensor['when']}"
    if len(plan.unsharded) > LISTED:
        rest = plan.unsharded[LISTED:]
        yield f"  and {len(rest)} more, together{'':<38} {size(sum(x['bytes'] for x in rest)):>12}"


def _work(plan: Plan) -> Iterator[str]:
    if plan.program_flops is not None:
        yield "\nCollectives a step, bytes of one device" + ("" if plan.collectives else ": none")
    for kind, found in plan.collectives.items():
        yield f"  {kind:<18} {found['count']:>7,} {size(found['bytes']):>12}"
    yield "\nFLOPs a step, all chips"
    for part, flops in plan.flops.items():
        yield f"  {part:<24} {flops:.4g}"
    yield f"  {'together, by hand':<24} {plan.flops_per_step:.4g}"
    if plan.program_flops is not None:
        ratio = f"{plan.program_flops / plan.flops_per_step:.2f} times, with everything that is recomputed"
        yield f"  {'compiled program':<24} {plan.program_flops:.4g} ({ratio})"


def _estimate(plan: Plan) -> Iterator[str]:
    if plan.program_flops is None:
        return
    found = plan.estimate
    yield "\nEstimate: a bound from published peaks, not a measurement"
    for name, seconds in (found.seconds or {}).items():
        yield f"  {name:<10} {seconds:>10.4f} s  {MEANING[name]}{'  <- the bound' if name == found.bound else ''}"
    if found.step_seconds:
        rate = f"{found.images_per_second:,.0f} images/s, MFU {found.mfu:.1%}"
        yield f"  at least {found.step_seconds:.4f} s a step; at most {rate}"
    for lack in found.lacks:
        yield f"  leaves out {lack}"
    if found.compiler is not None:
        yield from _by_compiler(found.compiler, plan.batch_size)


def _by_compiler(found: Compiler, batch: int) -> Iterator[str]:
    yield "\nEstimate of the TPU compiler, which leaves out waiting for data and for other chips"
    if found.clock_hz is None or found.seconds is None:
        yield f"  {found.cycles / 1e6:,.1f} million cycles a step, of a clock that is not published"
    else:
        clock = f"{found.cycles / 1e6:,.1f} million cycles at {found.clock_hz / 1e9:g} GHz"
        yield f"  {found.seconds:.4f} s a step ({clock}): {batch / found.seconds:,.0f} images/s, MFU {found.mfu:.1%}"
    for part, seconds in found.parts.items():
        share = seconds / found.seconds if found.seconds and part != COLLECTIVES else 0
        bar = f"{share:6.1%} {'#' * round(BAR * share)}" if share else "  beside these: their bytes over the links"
        yield f"  {part:<22} {1000 * seconds:>10.3f} ms {bar}".rstrip()
    counts = [f"{opcode} {n:,}" for opcode, n in found.uncosted.items() if not opcode.endswith("-done")]
    yield f"  without an estimate: {', '.join(counts[:LISTED]) or 'nothing'}"


def outcome(tried: Try) -> str:
    """One try of a search, in a line."""
    if tried.fits is None:
        result = f"the compiler failed: {tried.failure}"
    else:
        result = f"{'fits' if tried.fits else 'out of memory'}, needs {size(tried.needed)} a device"
    return f"batch {tried.batch_size:,}: {result} ({tried.seconds:.0f} s)"
