"""What must hold in the machine code for the kernels to reach the memory's speed: counted, with no GPU."""

import re
from itertools import chain

import pytest

import gpu_layers.kernels  # noqa: F401 - declares the kernels
from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compile_source, nvrtc
from gpu_layers.runtime.sources import source_folder
from profiling.compiled_code import most_registers, read_cubin
from tests.compiled_names import GATED as ARCHITECTURES
from tests.compiled_names import WHOLE, compiled, each_architecture, names_of

SOURCES = sorted({kernel.source for kernel in all_kernels()})
# Of these the arithmetic must not be what limits: all their memory traffic is in the hot loop.
STREAMING = (
    "dropout_apply<",
    "dropout_apply_shifted",
    "dropout_apply_grouped",
    "relu_",
    "batch_norm_statistics",
    "batch_norm_normalize",
)
STREAMING += ("batch_norm_gradient_sums", "batch_norm_input_gradient")
# Where the compiler of one CUDA version keeps a number in memory that the other's keeps in a register.
_LAST = "dropout_apply_last<float, 4>"
KEPT_IN_MEMORY = {
    (12, 80): [_LAST, "max_pool_forward_tiled<__half, 3, 1, 1, true, false>"],
    (12, 90): [
        _LAST,
        "dropout_apply_last<double, 2>",
        *(f"max_pool_forward_tiled<{half}, 3, 1, 1, true, false>" for half in ("__half", "__nv_bfloat16")),
    ],
    (12, 100): [
        _LAST,
        *(f"avg_pool_backward<{half}, 8, int>" for half in ("__half", "__nv_bfloat16")),
        *(f"max_pool_forward_tiled<{half}, 3, 1, 1, false, true>" for half in ("__half", "__nv_bfloat16")),
        *(f"max_pool_forward_tiled<{half}, 3, 2, 1, true, false>" for half in ("__half", "__nv_bfloat16")),
        "max_pool_forward_tiled<float, 3, 1, 1, true, false>",
        *(f"max_pool_backward_wide<{element}, 5, true>" for element in ("__half", "__nv_bfloat16", "float")),
    ],
}
# Those whose blocks wait for each other, or whose last one folds statistics in.
COUNTS_BLOCKS = re.compile("_persistent<|batch_norm_statistics<|batch_norm_merge_(statistics|parts)<")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")


def code_of(source, capability):
    """Name and code of each kernel of a file."""
    names = names_of(source, capability)
    module = compiled(source, names, capability)
    code = read_cubin(module.path)
    return {name: code[module.symbols[name]] for name in names}


def streams(name):
    """Whether a kernel moves whole vectors: not those for samples, or for channels that make no vectors."""
    return name.startswith(STREAMING) and not re.search(", 1[,>]|NhwcLayout<1>|kSmooth", name)


def atomics(kernel):
    return [i.opcode for i in kernel.instructions if i.mnemonic in ATOMICS]


def memory_problems(kernel, most_registers=64):
    resources = kernel.resources
    problems = [
        f"{what} of {size} bytes"
        for what, size in (("stack", resources.stack), ("local memory", resources.local))
        if size
    ]
    problems += [f"{i.opcode} (spill)" for i in kernel.instructions if i.mnemonic in ("LDL", "STL")]
    problems += atomics(kernel)
    if resources.registers > most_registers:
        problems.append(f"{resources.registers} registers")
    return problems


def divisions(loop):
    # Division and square root are calls of a function, or start from an approximate reciprocal. (A call of a
    # label of the same function is how some architectures leave a loop.)
    return [
        i.opcode
        for i in loop.instructions
        if i.mnemonic == "MUFU" or (i.mnemonic == "CALL" and ".L_x_" not in i.operands)
    ]


def hot_loop_problems(kernel, widths=(0, 16)):
    problems = [
        f"{instruction.opcode} moves {instruction.global_bytes} bytes"
        for instruction in kernel.hot_loop().instructions
        if instruction.global_bytes not in widths
    ]
    return problems + divisions(kernel.hot_loop())


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_no_stack_no_atomics_few_registers(source, capability):
    problems = {
        name: memory_problems(kernel, most_registers(name)) for name, kernel in code_of(source, capability).items()
    }
    problems = {
        name: without_arrivals(found) if COUNTS_BLOCKS.search(name) else found for name, found in problems.items()
    }
    for name, found in problems.items():
        if name.startswith("max_unpool_forward<"):
            # The largest of whole numbers in shared memory, whatever the order.
            problems[name] = [problem for problem in found if problem != "ATOMS.MAX"]
    compiler = nvrtc().getVersion()[0]
    for name in KEPT_IN_MEMORY.get((compiler, capability), ()):
        problems[name] = beyond_one_number(problems.get(name, []))
    assert not {name: found for name, found in problems.items() if found}


def beyond_one_number(problems):
    """What is left but for one or two numbers of 8 bytes that a thread keeps in memory."""
    stacks = ("stack of 8 bytes", "stack of 16 bytes")
    return [problem for problem in problems if problem not in stacks and not problem.endswith("(spill)")]


def without_arrivals(problems):
    """What is left but for the whole numbers that count blocks which have arrived: who waits for others only reads."""
    # NVRTC 12 spells an arrival whose count nobody reads in a way of its own where the machine has one.
    arrivals = ("ATOMG.E.ADD.STRONG.GPU", "ATOMG.E.OR.STRONG.GPU", "RED.E.ADD.STRONG.GPU", "REDG.E.ADD.STRONG.GPU")
    counting = [problem for problem in problems if problem in arrivals]
    assert 1 <= len(counting) <= 6
    return [problem for problem in problems if problem not in counting]


# What comes between a fence and an arrival was not written before it, and what is read between an arrival and the
# end of what the caches held may be old.
WRITES = ("ST", "STG", *ATOMICS, "BAR")
READS = ("LD", "LDG", "LDGSTS", *ATOMICS, "BAR", "NANOSLEEP")


def _comes_before(instructions, begins, others):
    """Of instructions one that ``begins`` like this, before any of these mnemonics."""
    for one in instructions:
        if one.opcode.startswith(begins):
            return one
        if one.mnemonic in others:
            return None
    return None


def barrier_problems(kernel, waits):
    """What is not ordered where blocks count each other, and, where one ``waits`` for others, wait.

    A release is a fence of the whole GPU, after all that the thread has written, and then the addition. An acquire is
    a read of what all of the GPU sees, and then the end of what the first-level cache held, before anything else is
    read.
    """
    problems, code = [], kernel.instructions
    adds = [index for index, one in enumerate(code) if one.mnemonic in ATOMICS]
    # An arrival whose count nobody reads, and the reads of who waits: the first, and those of a loop.
    arrives = [index for index in adds if code[index].mnemonic in ("RED", "REDG")]
    polls = [index for index, one in enumerate(code) if one.mnemonic in ("LD", "LDG") and ".STRONG." in one.opcode]
    if not adds or waits != bool(arrives) or len(polls) < 2 * len(arrives):
        problems.append(f"{len(arrives)} arrivals, {len(polls)} reads of who waits, {len(adds)} additions of all")
    narrow = [code[index] for index in (*adds, *polls) if not code[index].opcode.endswith(".STRONG.GPU")]
    problems += [f"{one.opcode} at {one.address:#x} is not for all of the GPU" for one in narrow]
    for index in arrives:
        following = _comes_before(code[index + 1 :], ("LD.", "LDG."), (*ATOMICS, "BAR"))
        if following is None or ".STRONG." not in following.opcode:
            problems.append(f"{code[index].opcode} at {code[index].address:#x}: nobody reads the count")
    for index in adds:
        one = code[index]
        fence = _comes_before(reversed(code[:index]), "MEMBAR.", WRITES)
        wide = fence is not None and fence.opcode in ("MEMBAR.ALL.GPU", "MEMBAR.SC.GPU")
        if not wide or fence.predicate not in ("", one.predicate):
            problems.append(f"{one.opcode} at {one.address:#x} is no release")
    for index in chain(polls, (index for index in adds if index not in arrives)):
        one = code[index]
        # Who waits looks at nothing else, and does not go on, before.
        others = (*READS, "BRA") if index in polls else READS
        dropped = _comes_before(code[index + 1 :], "CCTL.IVALL", others)
        if dropped is None or dropped.predicate not in ("", one.predicate):
            problems.append(f"{one.opcode} at {one.address:#x} is no acquire")
    return problems


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted({one.source for one in all_kernels() if COUNTS_BLOCKS.search(one.name)}))
def test_blocks_that_count_each_other_release_and_acquire(source, capability):
    """As ``group_barrier.cuh`` says by PTX; the emulator has fences in its place."""
    kernels = {name: kernel for name, kernel in code_of(source, capability).items() if COUNTS_BLOCKS.search(name)}
    problems = {name: barrier_problems(kernel, "_persistent<" in name) for name, kernel in kernels.items()}
    assert kernels
    assert not {name: found for name, found in problems.items() if found}


# What a barrier would be without one of its orders: a word of the header, and another in its place.
WEAKER = {
    "relaxed_arrival": ("red.release.gpu", "red.relaxed.gpu"),
    "arrival_of_a_block": ("red.release.gpu", "red.release.cta"),
    "relaxed_read": ("ld.acquire.gpu", "ld.relaxed.gpu"),
    "volatile_read": ("ld.acquire.gpu", "ld.volatile"),
    "read_of_a_block": ("ld.acquire.gpu", "ld.acquire.cta"),
    "relaxed_count": ("atom.acq_rel.gpu", "atom.relaxed.gpu"),
    "count_that_only_acquires": ("atom.acq_rel.gpu", "atom.acquire.gpu"),
    "count_that_only_releases": ("atom.acq_rel.gpu", "atom.release.gpu"),
    "count_of_a_block": ("atom.acq_rel.gpu", "atom.acq_rel.cta"),
}
MEETING = """
__global__ void meeting(float* parts, unsigned int* counts, float* y) {
    parts[blockIdx.x * blockDim.x + threadIdx.x] = y[threadIdx.x];
    group_barrier(counts, gridDim.x);
    y[threadIdx.x] = parts[threadIdx.x];
    if (arrives_last(counts + 1, gridDim.x)) y[threadIdx.x] += parts[blockDim.x + threadIdx.x];
}
"""


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_gate_of_barriers_finds_each_order_that_is_lost(capability, tmp_path):
    header = (source_folder() / "group_barrier.cuh").read_text().replace("#pragma once", "")
    texts = {"as_it_is": header} | {name: header.replace(*change) for name, change in WEAKER.items()}
    assert len(set(texts.values())) == 1 + len(WEAKER)
    code = "".join(f"namespace {name} {{\n{text}{MEETING}}}\n" for name, text in texts.items())
    (tmp_path / "meetings.cu").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_layers.runtime.nvrtc.source_folder", lambda: tmp_path)
        names = [f"{name}::meeting" for name in texts]
        cubin, symbols = compile_source("meetings.cu", names, Architecture(capability))
    (tmp_path / "meetings.cubin").write_bytes(cubin)
    kernels = read_cubin(tmp_path / "meetings.cubin")
    problems = {name: barrier_problems(kernels[symbols[f"{name}::meeting"]], waits=True) for name in texts}
    assert [name for name, found in problems.items() if not found] == ["as_it_is"]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_what_is_kept_moves_16_bytes_at_a_time(capability):
    for name, kernel in code_of("batch_norm_persistent.cu", capability).items():
        # The loop over vectors that fetches most, and the one that writes most of what was kept: the backward one
        # vector of two.
        for access, most in (("LDGSTS", 0.5), ("LDS", 6.0 if "backward" in name else 3.75)):
            loops = [
                loop
                for loop in kernel.loops()
                if any(i.mnemonic == access and "128" in i.opcode for i in loop.instructions)
            ]
            loop = max(loops, key=lambda loop: loop.global_bytes)
            assert loop.instructions_per_byte <= most, name
            assert {i.global_bytes for i in loop.instructions} == {0, 16}, name
            assert not divisions(loop), name


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("source", ["activation.cu", "batch_norm.cu", "dropout.cu"])
def test_hot_loops_move_16_bytes_at_a_time_and_do_not_divide(source, capability):
    kernels = {name: kernel for name, kernel in code_of(source, capability).items() if streams(name)}
    if capability == 80:
        # Its way back from where lanes exchange values hides the loop around.
        kernels = {name: kernel for name, kernel in kernels.items() if not name.startswith("dropout_apply_grouped")}
    assert kernels
    # ReLU moves, beside its vectors, the byte of bits of each eight elements.
    widths = (0, 1, 16) if source == "activation.cu" else (0, 16)
    problems = {name: hot_loop_problems(kernel, widths) for name, kernel in kernels.items()}
    assert not {name: found for name, found in problems.items() if found}


# Thread instructions for each byte of global memory. What GPUs issue in the time that their memory takes for a byte
# stands in profiling/devices.py: 11 of an H100, 7.8 of an H200.
@pytest.mark.parametrize(
    *each_architecture(
        ("name", "most"),
        [
            ("dropout_apply<__nv_bfloat16>", 6.0),
            ("dropout_apply<__half>", 6.0),
            ("dropout_apply<float>", 6.0),
            ("dropout_apply<double>", 6.0),
            ("dropout_apply_shifted<__nv_bfloat16>", 9.0),
            ("dropout_apply_shifted<__half>", 9.0),
            ("dropout_apply_shifted<float>", 9.0),
            ("dropout_apply_shifted<double>", 9.0),
            # The way of a vector that spans two channels, which is the longest.
            ("dropout_apply_grouped<__nv_bfloat16>", 6.0),
            ("dropout_apply_grouped<__half>", 6.0),
            ("dropout_apply_grouped<float>", 5.0),
            ("dropout_apply_grouped<double>", 5.0),
            ("relu_forward<__nv_bfloat16>", 3.0),
            ("relu_forward<__half>", 3.0),
            ("relu_forward<float>", 1.5),
            ("relu_forward<double>", 1.0),
            ("relu_backward<__nv_bfloat16>", 2.0),
            ("relu_backward<__half>", 2.0),
            ("relu_backward<float>", 1.5),
            ("relu_backward<double>", 1.0),
            ("batch_norm_statistics<__nv_bfloat16, NchwLayout>", 3.0),
            ("batch_norm_statistics<__half, NchwLayout>", 3.0),
            ("batch_norm_statistics<float, NchwLayout>", 3.0),
            ("batch_norm_statistics<double, NchwLayout>", 3.0),
            ("batch_norm_statistics<__nv_bfloat16, NhwcLayout<8>>", 3.0),
            ("batch_norm_statistics<__half, NhwcLayout<8>>", 3.0),
            ("batch_norm_statistics<float, NhwcLayout<4>>", 3.0),
            ("batch_norm_statistics<double, NhwcLayout<2>>", 3.0),
            ("batch_norm_normalize<__nv_bfloat16, NchwLayout, kPiecewiseLinear>", 3.0),
            ("batch_norm_normalize<__nv_bfloat16, NhwcLayout<8>, kPiecewiseLinear>", 3.0),
            ("batch_norm_gradient_sums<__nv_bfloat16, NchwLayout, kPiecewiseLinear>", 4.0),
            ("batch_norm_gradient_sums<__nv_bfloat16, NhwcLayout<8>, kPiecewiseLinear>", 4.0),
            ("batch_norm_input_gradient<__nv_bfloat16, NchwLayout, kPiecewiseLinear>", 3.0),
            ("batch_norm_input_gradient<__nv_bfloat16, NhwcLayout<8>, kPiecewiseLinear>", 3.0),
        ],
    )
)
def test_instructions_per_byte(name, most, capability):
    sources = {"dropout": "dropout.cu", "relu": "activation.cu"}
    source = sources.get(name.partition("_")[0], "batch_norm.cu")
    if capability == 80 and name.startswith("dropout_apply_grouped"):
        return  # as above
    assert code_of(source, capability)[name].hot_loop().instructions_per_byte <= most


# Of the backward of batch norm and max pooling of 3x3 windows 2 apart, where all four windows are over each of the
# values: of four in a plane one is under four, of the others two are under two. By the kernels that read once, of their
# loops over vectors that move them: x is fetched, its gradient is gathered and kept (of rows it is summed, too), that
# of the input is written.
@pytest.mark.parametrize(
    *each_architecture(
        ("element", "width", "nchw", "nhwc"),
        [("__half", 8, 5.0, 11.0), ("__nv_bfloat16", 8, 5.0, 11.0), ("float", 4, 3.5, 6.5), ("double", 2, 3.0, 6.0)],
    )
)
def test_instructions_of_a_gathered_gradient(element, width, nchw, nhwc, capability):
    kernels = code_of("batch_norm_max_pool_backward.cu", capability)
    moved = 16 + 16 + (16 + width) / 4
    for layout, most in (("NchwLayout, 3, 2, 1", nchw), (f"NhwcLayout<{width}>", nhwc)):
        kernel = kernels[name := f"batch_norm_max_pool_backward_persistent<{element}, {layout}>"]
        took = 0.0
        for access in ("LDGSTS", "STS.128", "STG.E.128"):
            kept = [(sum(i.opcode.startswith(access) for i in loop.instructions), loop) for loop in kernel.loops()]
            took += min(len(loop.instructions) / vectors for vectors, loop in kept if vectors)
            assert not [problem for vectors, loop in kept if vectors for problem in divisions(loop)]
        assert took / moved <= most, name


@pytest.mark.parametrize(
    *each_architecture(("element", "most"), [("__nv_bfloat16", 6.9), ("__half", 6.9), ("float", 5.1), ("double", 5.1)])
)
def test_dropout_by_samples_reads_numbers_of_samples_and_vectors(element, most, capability):
    loop = code_of("dropout.cu", capability)[f"dropout_apply_samples<{element}>"].hot_loop()
    accesses = [i.global_bytes for i in loop.instructions if i.global_bytes]
    assert sorted(accesses) == [8] * 2 + [16] * 4
    assert not [i.opcode for i in loop.instructions if i.mnemonic == "MUFU"]
    # The 8-byte numbers come from a cache: neighbouring threads share them.
    assert len(loop.instructions) / 64 <= most


# Its Philox blocks are a loop within that over parts, so that all is counted, what runs once too: both blocks of four
# positions, decisions over elements and over channels.
@pytest.mark.parametrize(
    *each_architecture(
        ("kernel", "most"), [("__nv_bfloat16, 8", 7.0), ("__half, 8", 7.0), ("float, 4", 4.5), ("double, 2", 3.5)]
    )
)
def test_dropout_of_channels_last_moves_vectors(kernel, most, capability):
    code = code_of("dropout.cu", capability)[f"dropout_apply_last<{kernel}>"]
    accesses = [i.global_bytes for i in code.instructions if i.global_bytes]
    # Seed and offset, where they lie in memory; x, residual and y at four positions.
    assert sorted(accesses) == [8] * 2 + [16] * 12
    assert not [i.opcode for i in code.instructions if i.mnemonic == "MUFU"]
    assert len(code.instructions) / (12 * 16) <= most


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_activation_and_dropout_move_vectors_and_bytes_of_bits(capability):
    for name, kernel in code_of("activation_dropout.cu", capability).items():
        if "_last<" in name:
            # Seed and offset, where they lie in memory, and vectors, or single elements.
            moved = {i.global_bytes for i in kernel.instructions} - {0, 8}
            assert moved <= ({2, 4} if name.endswith(", 1>") else {16}), name
            continue
        accesses = [i.global_bytes for i in kernel.hot_loop().instructions if i.global_bytes]
        assert accesses.count(1) <= accesses.count(16), name
        assert set(accesses) <= {1, 16}, name


@pytest.mark.parametrize(
    *each_architecture(("element", "width", "most"), [("__half", 8, 6.0), ("__nv_bfloat16", 8, 6.0), ("float", 4, 3.5)])
)
def test_a_branch_is_added_to_a_residual_in_vectors(element, width, most, capability):
    kernels = code_of("dropout_add.cu", capability)
    for name in (f"dropout_add_forward<{element}, true>", f"dropout_add_backward<{element}, {width}, true>"):
        loop = kernels[name].hot_loop()
        # Beside vectors a byte of bits, which only ReLU has, for each that is read or written.
        accesses = [i.global_bytes for i in loop.instructions if i.global_bytes]
        assert accesses.count(1) <= accesses.count(16) / 2, name
        # A bias of features that make no vectors is read one by one.
        assert set(accesses) <= {1, 4, 16}, name
        assert loop.instructions_per_byte <= most, name
        assert not divisions(loop), name


TILED = re.compile(r"(max|avg)_pool_(forward|backward)_tiled<(\w+), (\d), (\d), (\d), (\w+), (\w+)>")


def pooled_round(name, kernel):
    """Instructions of a round of a tiled kernel's walk along a strip of whole tiles, and its bytes of DRAM traffic.

    A round has a row of outputs or, where the code says so by what it stores, several. Instructions that only every
    second round executes are counted as if each did.
    """
    op, direction, element, size, stride, _, last, deep = TILED.match(name).groups()
    size, stride, bytes_each = int(size), int(stride), 4 if element == "float" else 2
    outputs = 16 // bytes_each if last == "true" else min(16 // bytes_each // stride, 4)
    inputs_of_row, outputs_of_row = (outputs * n * bytes_each for n in (stride**2, 1))
    taps_of_row = outputs * (op == "max")
    stored_of_row = inputs_of_row if direction == "backward" else outputs_of_row + taps_of_row

    # Of rows of whole tiles and of others: the one with the wider accesses, and more of them.
    def whole_tiles(loop):
        return max(i.global_bytes for i in loop.instructions), loop.global_bytes, -len(loop.instructions)

    loop = around = max(kernel.loops(), key=whole_tiles)
    if not any(i.mnemonic == "STG" for i in loop.instructions):
        assert deep == "true"
        around = kernel.around(loop)
    rows = sum(i.global_bytes for i in around.instructions if i.mnemonic == "STG") // stored_of_row
    instructions = len(around.instructions)
    if around is not loop:
        # The rows that a window takes: one after another, or as many as there are windows over two rows of inputs.
        again = size - stride if direction == "backward" else size - 1 if last == "true" and size > 2 else 0
        instructions += again * len(loop.instructions)
    return instructions, max(rows, 1) * (inputs_of_row + outputs_of_row + taps_of_row)


def tiled_kernels(capability, op, direction, window, deep=None):
    """Those of `deep` windows or of others, but for windows side by side, which have the same kernels."""
    kernels = {}
    for name, kernel in code_of(f"{op}_pool_tiled.cu", capability).items():
        match = TILED.match(name)
        if match.group(2) == direction and f", {window}, " in name and match.group(8) == (deep or match.group(8)):
            kernels[name] = kernel
    # float32, bfloat16 and, where it is compiled, float16, in two layouts.
    assert len(kernels) == (6 if capability == WHOLE else 4)
    return kernels


# Thread instructions for each byte of DRAM: what the longest way takes, an avg that divides by different numbers; max
# asks for rows ahead. Deep windows, whose rows are not shared, have theirs of one depth.
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "direction", "window", "deep", "most_half", "most_float"),
    [
        ("max", "forward", "2, 2, 0", None, 3.5, 3.0),
        ("max", "forward", "3, 2, 1", "false", 3.5, 3.0),
        ("max", "forward", "3, 1, 1", "false", 5.0, 4.1),
        ("max", "forward", "3, 2, 1", "true", 6.0, 5.0),
        ("max", "forward", "3, 1, 1", "true", 13.0, 11.0),
        # Half of the rounds skip what reads the next two rows, which is counted for all.
        ("max", "backward", "2, 2, 0", None, 3.0, 2.9),
        ("max", "backward", "3, 2, 1", "false", 5.1, 3.6),
        ("max", "backward", "3, 1, 1", "false", 9.9, 5.6),
        ("max", "backward", "3, 2, 1", "true", 8.5, 6.5),
        ("max", "backward", "3, 1, 1", "true", 17.0, 11.0),
        ("avg", "forward", "2, 2, 0", None, 5.0, 4.0),
        ("avg", "forward", "3, 2, 1", "false", 5.0, 3.5),
        ("avg", "forward", "3, 1, 1", "false", 10.0, 5.0),
        ("avg", "forward", "3, 2, 1", "true", 6.5, 5.0),
        ("avg", "forward", "3, 1, 1", "true", 17.0, 9.0),
        ("avg", "backward", "2, 2, 0", None, 4.0, 3.0),
        ("avg", "backward", "3, 2, 1", "false", 6.0, 4.5),
        ("avg", "backward", "3, 1, 1", "false", 10.5, 5.5),
        ("avg", "backward", "3, 2, 1", "true", 13.0, 10.5),
        ("avg", "backward", "3, 1, 1", "true", 31.0, 16.0),
    ],
)
def test_instructions_per_byte_of_tiled_pooling(op, direction, window, deep, most_half, most_float, capability):
    for name, kernel in tiled_kernels(capability, op, direction, window, deep).items():
        # Pairs of bfloat16 are compared half by half before 9.0.
        by_halves = capability < 90 and name.startswith("max_pool_forward_tiled<__nv_bfloat16")
        if by_halves and deep != "false":
            continue
        instructions, moved = pooled_round(name, kernel)
        most = most_float if "<float" in name else most_half
        assert instructions / moved <= most * (1.6 if by_halves else 1), name


@pytest.mark.parametrize("capability", [capability for capability in ARCHITECTURES if capability >= 90])
def test_max_pooling_takes_few_instructions_for_each_byte_of_input(capability):
    for name, kernel in tiled_kernels(capability, "max", "forward", "3, 2, 1", "false").items():
        if ", true, " in name:
            instructions, _ = pooled_round(name, kernel)
            # A vector of outputs has four of inputs.
            assert instructions / (4 * 16) <= 4, name


@pytest.mark.parametrize(*each_architecture(("element",), ["__nv_bfloat16", "__half", "float", "double"]))
def test_gradients_of_whole_planes_of_channels_are_stored_in_vectors(element, capability):
    width = {"double": 2, "float": 4}.get(element, 8)
    kernel = code_of("global_pool.cu", capability)[f"global_spread_nhwc<{element}, {width}>"]
    assert not hot_loop_problems(kernel)
    assert kernel.hot_loop().instructions_per_byte <= 3


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("source", ["max_pool.cu", "max_pool_tiled.cu", "avg_pool_tiled.cu", "global_pool.cu"])
def test_pooling_loops_do_not_divide(source, capability):
    for name, kernel in code_of(source, capability).items():
        # 64-bit indices, those of images of 2**31 elements and more, are divided as they are.
        if name.endswith("long long>"):
            continue
        for loop in kernel.loops():
            assert not [i.opcode for i in loop.instructions if i.mnemonic == "MUFU"], name


CONTROLS = """
__global__ void scalar_copy(const float* x, float* y, int n) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] + 1.0f;
}
__global__ void dividing(const float4* x, float4* y, int n, float d) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float4 v = x[i];
        y[i] = make_float4(v.x / d, v.y / v.x, v.z / d, v.w / d);
    }
}
__global__ void spilling(const int* x, int* y, int n) {
    int table[64];
    for (int i = 0; i < 64; ++i) table[i] = x[i] * i;
    for (int i = 0; i < n; ++i) y[i] = table[x[i] & 63];
}
__global__ void atomic_sum(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }
__global__ void vector_copy(const float4* x, float4* y, int n) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
"""


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """Kernels that break the gates on purpose, and one that does not."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "controls.cu").write_text(CONTROLS)
    names = ["scalar_copy", "dividing", "spilling", "atomic_sum", "vector_copy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_layers.runtime.nvrtc.source_folder", lambda: folder)
        code, symbols = compile_source("controls.cu", names, Architecture(90))
    (folder / "controls.cubin").write_bytes(code)
    kernels = read_cubin(folder / "controls.cubin")
    return {name: kernels[symbol] for name, symbol in symbols.items()}


def test_the_gates_find_what_they_are_for(controls):
    assert any("4 bytes" in problem for problem in hot_loop_problems(controls["scalar_copy"]))
    assert any(problem.startswith(("MUFU", "CALL")) for problem in hot_loop_problems(controls["dividing"]))
    assert any("stack" in problem for problem in memory_problems(controls["spilling"]))
    assert any("spill" in problem for problem in memory_problems(controls["spilling"]))
    assert any(problem.startswith(ATOMICS) for problem in memory_problems(controls["atomic_sum"]))


def test_the_gates_pass_what_is_right(controls):
    assert hot_loop_problems(controls["vector_copy"]) == []
    assert memory_problems(controls["vector_copy"]) == []
    loop = controls["vector_copy"].hot_loop()
    # One load and one store of 16 bytes, and some ten instructions of counting and addressing.
    assert loop.global_bytes == 32
    assert 5 <= len(loop.instructions) <= 20
