"""Kernels as they are, on one multiprocessor; and kernels that were broken on purpose, which the emulator must not run
as if nothing were wrong."""

import multiprocessing
from unittest import mock

import problems
import pytest
import torch
from host import backend, build

import vitkernels as vk
from vitkernels.backends import cuda
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import backward_plan
from vitkernels.gpu import NOMINAL, Gpu
from vitkernels.testing import accuracy, oracle

U8, HALF, F32 = torch.uint8, torch.float16, torch.float32


def arguments(B, C, H, W, P, D, pixels=HALF, **more) -> dict:
    return problems.arguments(B, C, H, W, P, D, pixels=pixels, **({"T": 0, "pos": None, "weights": HALF} | more))


@pytest.fixture(autouse=True)
def forget_after(on_cuda_kernels, poisoned):
    """What is cached of an emulated GPU ends with the test: on_cuda_kernels sees to it. What is not written is NaN."""


def wrong_tokens(loader: str, **arguments) -> list[str]:
    """What is wrong with the forward on each plan of this loader."""
    p = vk.explain(**arguments).problem
    names = "images", "weight", "bias", "pos_embed", "prefix", "keep"
    tensors = canonical(*(arguments.get(name) for name in names))
    exact, eager = oracle.oracle(**arguments), oracle.eager(**arguments)
    bound = 2 * accuracy.error_of(eager, exact) + exact.abs().max().item() * torch.finfo(p.compute_dtype).eps
    plans = {how: q for how, q in cuda.candidates(p, *tensors).items() if loader in how.replace(BY_16, "")}
    assert plans
    errors = {how: accuracy.error_of(cuda.forward(p, *tensors, plan=plan), exact) for how, plan in plans.items()}
    return [f"{how}: {error} above {bound}" for how, error in errors.items() if not error <= bound]


def wrong_gradients(**arguments) -> list[str]:
    return [str(row) for row in accuracy.compare(arguments, "cuda", gradients=True) if not row["ok"]]


def alone(act):
    """What act() returns in a process of its own: a broken kernel may write anywhere."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)  # a fork has no more
        try:
            send.send(act())
        except RuntimeError as error:  # the emulator's
            send.send([str(error)])

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        return [f"ended with {process.exitcode}"]
    finally:
        process.join()


def by_pieces(**call) -> list:
    """wrong_gradients, by wgmma from copies of dY in float32, of at most 16 images at a time."""
    call["out_dtype"] = F32
    p = vk.explain(**call).problem
    few = 16 * p.rows * p.D * 2
    with mock.patch.multiple(backward_plan, COPY_COST=0.0, _fits=lambda parts, copies: copies <= few):
        backend.forget()
        return wrong_gradients(**call)


def in_pairs(**call) -> list:
    with mock.patch.object(backward_plan, "PAIRS", True):
        backend.forget()
        return wrong_gradients(**call)


COPY, ROWS = "pixels copied asynchronously", "image rows copied whole"
STORED, COPIED = "patches cut and tokens stored by the copy engine", "patches copied for wgmma"
BY_16, PAIRS, SPLITS = " (16 bytes at a time)", "pairs of tiles", "each by"
# Architecture, and what is computed there: on one multiprocessor, so that a block has many tiles or steps; pairs on
# two, tiles whose k is divided on many
CASES = {
    "copy": (80, lambda: wrong_tokens(COPY, **arguments(2, 3, 32, 48, 16, 72))),
    "rows": (80, lambda: wrong_tokens(ROWS, **arguments(2, 3, 28, 42, 14, 72))),
    "wgmma, hwc": (
        90, lambda: wrong_tokens(STORED, **arguments(
            9, 3, 64, 48, 16, 264, U8, channels_last=True, mean=(0.2, 0.5, 0.7), std=(0.2, 0.3, 0.1))),
    ),
    "wgmma, stored": (90, lambda: wrong_tokens(STORED, **arguments(33, 1, 64, 48, 16, 264))),
    "wgmma, float32 stored": (90, lambda: wrong_tokens(STORED, **arguments(33, 3, 64, 48, 16, 264, out_dtype=F32))),
    "wgmma, u8 stored": (90, lambda: wrong_tokens(STORED, **arguments(33, 3, 64, 48, 16, 264, U8, mean=0.5, std=0.2))),
    "wgmma, in groups": (90, lambda: wrong_tokens(STORED, **arguments(33, 3, 28, 112, 14, 264, pos="N"))),
    "wgmma, u8 groups": (90, lambda: wrong_tokens(STORED, **arguments(9, 3, 28, 112, 14, 72, U8, mean=0.5, std=0.2))),
    "wgmma, own positions": (
        90, lambda: wrong_tokens(COPIED, **arguments(33, 3, 64, 48, 16, 192, pos="N", kept=7, scale=0.5)),
    ),
    "wgmma, kept": (90, lambda: wrong_tokens(COPIED, **arguments(33, 3, 64, 48, 16, 264, pos="N", kept=7))),
    "wgmma, padded": (90, lambda: wrong_tokens(COPIED, **arguments(33, 1, 64, 48, 16, 264, pos="N", padding=4))),
    "wgmma, kept, packed": (
        90, lambda: wrong_tokens(COPIED, **arguments(33, 3, 64, 48, 16, 264, kept=7, channels_last=True)),
    ),
    "wgmma, rows": (90, lambda: wrong_tokens(f"{ROWS}, wgmma", **arguments(33, 1, 56, 112, 14, 264, U8))),
    "wgmma, float32": (  # normalised, so that pixels have all 24 bits
        90, lambda: wrong_tokens(STORED, **arguments(33, 1, 64, 48, 16, 264, F32, weights=F32, mean=0.3, std=0.7)),
    ),
    "wgmma, pairs": (90, lambda: wrong_tokens(PAIRS, **arguments(33, 1, 64, 48, 16, 264))),
    "wgmma, float32 pairs": (90, lambda: wrong_tokens(PAIRS, **arguments(33, 1, 64, 48, 16, 264, F32, weights=F32))),
    "wgmma, hwc pairs": (90, lambda: wrong_tokens(PAIRS, **arguments(9, 3, 64, 48, 16, 264, channels_last=True))),
    "wgmma, splits": (90, lambda: wrong_tokens(SPLITS, **arguments(9, 3, 64, 48, 16, 264))),
    "wgmma, float32 splits": (90, lambda: wrong_tokens(SPLITS, **arguments(9, 3, 64, 48, 16, 264, out_dtype=F32))),
    "backward": (80, lambda: wrong_gradients(**arguments(3, 3, 32, 48, 16, 72))),
    "backward, bytes": (80, lambda: wrong_gradients(**arguments(40, 3, 32, 48, 16, 72, U8, mean=0.5, std=0.2))),
    "backward, wgmma": (90, lambda: wrong_gradients(**arguments(40, 3, 32, 48, 16, 72))),
    "backward, by threads": (90, lambda: wrong_gradients(**arguments(40, 3, 32, 48, 16, 256, kept=7))),
    "backward, copies": (90, lambda: by_pieces(**arguments(40, 3, 32, 48, 16, 72, T=1, pos="T+N"))),
    "backward, kept copies": (90, lambda: by_pieces(**arguments(40, 3, 32, 48, 16, 72, kept=7, pos="N"))),
    "backward, pairs": (90, lambda: in_pairs(**arguments(40, 3, 32, 48, 16, 264))),
    "dX": (90, lambda: wrong_gradients(**arguments(9, 3, 32, 96, 16, 264, mean=0.5, std=0.2))),
    "backward, in groups": (90, lambda: wrong_gradients(**arguments(40, 3, 28, 56, 14, 72))),
}  # fmt: skip


def gpu_of(case: str) -> Gpu:
    gpu = NOMINAL[CASES[case][0]]
    return gpu if "splits" in case else gpu._replace(multiprocessors=2 if "pairs" in case else 1)


BYTES = "wgmma, u8 stored", "wgmma, hwc", "wgmma, u8 groups", "wgmma, rows"  # cases of SM90 from 8-bit pixels


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_right_as_they_are(host_extension, monkeypatch, case, seed):
    act = CASES[case][1]
    monkeypatch.setenv("VITKERNELS_HOST_SEED", str(seed))
    backend.use(monkeypatch, host_extension, gpu_of(case))
    assert act() == []


FORWARD, SM90 = (f"forward/instances/forward_{arch}_f16.cu" for arch in ("sm80", "sm90"))
SM90_F32, OPERANDS = "forward/instances/forward_sm90_f32.cu", "forward/operands_sm90.cuh"
BACKWARD, BACKWARD_90 = (f"backward/instances/backward_{arch}_f16.cu" for arch in ("sm80", "sm90"))


STAGE = """Barrier* full = &barriers.full[state.stage];
            char* stage = stages + state.stage * a.stage_bytes;
"""
EMPTY = f"barrier_wait(&barriers.empty[state.stage], state.phase ^ 1);\n            {STAGE}"

IMAGES = BACKWARD_90, "backward/images_sm90.cuh"
MUTATIONS = {  # object, header, what it says and what it is to say, and the case that shows it
    "a row of a fragment": (FORWARD, "common/warp_mma.cuh", "(row + lane % 16)", "(row + (lane + 1) % 16)", "copy"),
    "a pixel of a fragment": (FORWARD, "forward/loaders.cuh", "2 * t + 8 * h)", "2 * t + 1 + 8 * h)", "rows"),
    "no barrier in a step": (FORWARD, "forward/sm80.cuh", "sync_block();  // the step's", "// the step's", "copy"),
    "a wait too short": (FORWARD, "forward/sm80.cuh", "default: copy_wait<2>();", "default: copy_wait<3>();", "copy"),
    "a stage overwritten": (
        SM90, "forward/producers_sm90.cuh", f"{EMPTY}{12 * ' '}if (leader)", f"{STAGE}{12 * ' '}if (leader)",
        "wgmma, stored",
    ),
    "a descriptor": (SM90, "common/ptx.cuh", ">> 4) | uint64_t{1} << 16", ">> 5) | uint64_t{1} << 16", "wgmma, stored"),
    "staged sums not met at": (
        SM90, "forward/epilogue_sm90.cuh", "staged, 64 + 4);\n        sync_warp();", "staged, 64 + 4);", "wgmma, kept",
    ),
    "a table not waited for": (
        SM90, "forward/sm90.cuh", "barrier_wait(barriers.table_full, table_phase);", "", "wgmma, stored",
    ),
    "a table overwritten": (
        SM90, "forward/producers_sm90.cuh", "barrier_wait(barriers.table_empty, phase ^ 1);\n        fill_table",
        "fill_table", "wgmma, stored",
    ),
    "tokens not fenced": (SM90, "forward/epilogue_sm90.cuh", "fence_copy_engine();", "", "wgmma, stored"),
    "tokens overwritten": (
        SM90, "forward/epilogue_sm90.cuh", "stores_wait<STORE_BUFFERS - 1>", "stores_wait<STORE_BUFFERS>",
        "wgmma, stored",
    ),
    "tokens not met at": (
        SM90, "forward/epilogue_sm90.cuh", "fence_copy_engine();\n        sync_warp();", "fence_copy_engine();",
        "wgmma, stored",
    ),
    "a piece of tokens": (SM90, "forward/epilogue_sm90.cuh", "(r / 2 % 4)) * 16", "(r % 4)) * 16", "wgmma, stored"),
    "the next tile too early": (
        SM90, "forward/producers_sm90.cuh", "sync_some(1, 128);  // the last", "// the last", "wgmma, rows",
    ),
    "copies not fenced": (
        SM90, "forward/sm90.cuh", "if constexpr (Loader::DIRECT && Loader::BY_THREADS) fence_copy_engine();", "",
        "wgmma, kept",
    ),
    "copies not swizzled": (
        SM90, "forward/producers_sm90.cuh", "Loader::DIRECT ? swizzled<LINE>(at)", "false ? at", "wgmma, kept",
    ),
    "a table filled too early": (
        SM90, "forward/producers_sm90.cuh", "barrier_wait(barriers.table_empty, phase ^ 1);\n            fill_table",
        "fill_table", "wgmma, padded",
    ),
    "whose positions": (
        SM90, "forward/epilogue_sm90.cuh", "shuffle(mine, lane_index() / 4 + 8 * below)",
        "shuffle(mine, lane_index() / 4)", "wgmma, own positions",
    ),
    "scaled twice": (
        SM90, "forward/epilogue_sm90.cuh", "if (a.pos.data) scales[below] = 1;", "", "wgmma, own positions",
    ),
    "a place in a group": (
        SM90, "forward/producers_sm90.cuh", "place * a.layout.S_w + x,", "x,", "wgmma, in groups",
    ),
    "a position of a group": (
        SM90, "forward/epilogue_sm90.cuh", "block.position_of(row + g)", "((row + g) & (block.period() - 1))",
        "wgmma, in groups",
    ),
    "tokens of a group": (
        SM90, "forward/epilogue_sm90.cuh", "static_cast<int>(at[2]) & ((1 << block.group) - 1));", "0);",
        "wgmma, in groups",
    ),
    "weights not padded": (
        "forward/forward.cu", "forward/forward.cu", "x < a.layout.P_w && k < a.layout.K", "k < a.layout.K",
        "wgmma, u8 groups",
    ),
    "the rest of a pixel": (SM90_F32, OPERANDS, "to_tf32(x - from_bits(whole[i]))", "0", "wgmma, float32"),
    "the rest of a weight": (SM90_F32, "forward/sm90.cuh", "weight(first, i) + next_term", "weight(first, i)",
                             "wgmma, float32"),
    "a part of a stage": (SM90, OPERANDS, "? offsets[i] :", "? offsets[0] :", "wgmma, u8 stored"),
    "half of a part": (SM90, OPERANDS, "(HALF < BOX ? HALF :", "(HALF < BOX ? 0 :", "wgmma, u8 stored"),
    "constants of a part": (SM90, OPERANDS, "k + half * HALF", "half * HALF", "wgmma, hwc"),
    "where that lies": (
        SM90_F32, "forward/producers_sm90.cuh", "static_cast<int>(h.a.weight_row) / K::TERMS * term", "0",
        "wgmma, float32",
    ),
    "not packed yet": (
        SM90, "forward/producers_sm90.cuh", "if (leader) wait_for_prerequisites();", "", "wgmma, in groups",
    ),
    "not packed yet, by threads": (
        SM90, "forward/producers_sm90.cuh", "if (m == 0) wait_for_prerequisites();", "", "wgmma, kept, packed",
    ),
    "parts of dW not there yet": (
        "backward/backward.cu", "backward/reduce.cuh", "wait_for_prerequisites();", "", "backward, wgmma",
    ),
    "dX's weight not packed yet": (*IMAGES, "wait_for_prerequisites();", "", "dX"),
    "how it is packed": ("forward/forward.cu", "forward/forward.cu", "value - whole", "value", "wgmma, float32"),
    "warpgroups not met at": (SM90, "forward/sm90.cuh", "? (warp < 4 ? a.lag : 0)", "? warp / 4 - 1", "wgmma, pairs"),
    "a cluster's beginning": (SM90, "forward/sm90.cuh", "sync_cluster();  // none", ";  // none", "wgmma, pairs"),
    "a cluster's end": (SM90, "forward/sm90.cuh", "sync_cluster();  // nor", ";  // nor", "wgmma, pairs"),
    "a stage of a pair overwritten": (SM90, "forward/sm90.cuh", "8 << pair_bits<K>(h)", "8", "wgmma, pairs"),
    "whose stage is free": (
        SM90, "forward/producers_sm90.cuh", "barrier_arrive(empty, lane_index());", "barrier_arrive(empty, 0);",
        "wgmma, pairs",
    ),
    "a block's part of the weight": (
        SM90, "forward/producers_sm90.cuh", "row = rank_in_cluster(h.pair_bits) * rows", "row = 0",
        "wgmma, pairs",
    ),
    "a block's patches": (
        SM90, "forward/producers_sm90.cuh", " + rank_in_cluster(pair_bits);", ";", "wgmma, pairs",
    ),
    "where a part of the weight goes": (
        SM90, "forward/producers_sm90.cuh", "(i * K::BN + row) * span", "(i * rows + row) * span", "wgmma, hwc pairs",
    ),
    "the rest of a part of the weight": (
        SM90_F32, "forward/producers_sm90.cuh", "h.a.a_bytes + term * bytes", "h.a.a_bytes", "wgmma, float32 pairs",
    ),
    "a part of k": (
        SM90, "forward/producers_sm90.cuh", "step = first_step<K>(h, part);", "step = 0;", "wgmma, splits",
    ),
    "sums of a cluster not met at": (
        SM90, "forward/epilogue_sm90.cuh", "sync_cluster();", "", "wgmma, splits",
    ),
    "whose sums": (SM90, "forward/epilogue_sm90.cuh", "read_words_of(s,", "read_words_of(rank,", "wgmma, splits"),
    "the sums' end": (SM90, "forward/sm90.cuh", "sync_cluster();  // nor", ";  // nor", "wgmma, splits"),
    "whose channels": (SM90, "forward/sm90.cuh", "first = part * channels", "first = 0", "wgmma, float32 splits"),
    "channels of another": (
        SM90, "forward/epilogue_sm90.cuh", "if (part * COLUMNS >= channels) break;", "", "wgmma, float32 splits",
    ),
    "where a block's sums are": (
        SM90, "forward/epilogue_sm90.cuh", "rank * (N >> BITS) * 128", "rank * (N >> BITS) * 64", "wgmma, splits",
    ),
    "a stage of dX overwritten": (
        *IMAGES, "barrier_wait(&empty[state.stage], state.phase ^ 1);\n            Barrier*", "Barrier*", "dX",
    ),
    "a piece of pixels": (*IMAGES, "swizzled<K::LINE>(lane % 16", "(lane % 16", "dX"),
    "pixels not fenced": (*IMAGES, "fence_copy_engine();", "", "dX"),
    "pixels overwritten": (*IMAGES, "stores_wait<STORE_BUFFERS - 1>", "stores_wait<STORE_BUFFERS>", "dX"),
    "a row of pixels": (*IMAGES, "row - channel * h.layout.P_h", "0", "dX"),
    "a channel's factor": (*IMAGES, "h.centred + h.C + channel_of", "h.centred + channel_of", "dX"),
    "the weight's order": (*IMAGES, "columns + d * 128, K::COLUMNS", "columns + d * 64, K::COLUMNS", "dX"),
    "no barrier in a step of dW": (
        BACKWARD, "backward/weight_sm80.cuh", "convert(step);\n            sync_block();", "convert(step);", "backward",
    ),
    "patches looked up too early": (
        BACKWARD, "backward/weight_sm80.cuh", "ROW_STEPS == STAGES - 2)", "ROW_STEPS == STAGES - 3)", "backward, bytes",
    ),
    "a patch of its warp": (
        BACKWARD_90, "backward/weight_producers_sm90.cuh", "WGMMA_STEP + m) * K::LINE",
        "WGMMA_STEP + (m ^ 8)) * K::LINE", "backward, by threads",
    ),
    "copies of dW not fenced": (
        BACKWARD_90, "backward/weight_sm90.cuh", "if constexpr (K::BY_THREADS) fence_copy_engine();", "",
        "backward, by threads",
    ),
    "a swizzle by hand": (
        BACKWARD_90, "common/ptx.cuh", "at ^ (at >> 7", "at ^ (at >> 8",
        "backward, by threads",
    ),
    "a patch of a group": (
        BACKWARD_90, "backward/weight_producers_sm90.cuh", "place * h.layout.S_w + work.x", "work.x",
        "backward, in groups",
    ),
    "a pixel past the patch": (
        BACKWARD_90, "backward/weight_sm90.cuh", "second = g + 8 < pixels", "second = true", "backward, in groups",
    ),
    "dY of a group": (
        BACKWARD_90, "backward/weight_sm90.cuh", "line, image, row}", "line, image, line}", "backward, in groups",
    ),
    "parts of dW of the images before": (
        BACKWARD_90, "backward/weight_sm90.cuh", "h.more = l.more", "h.more = false", "backward, copies",
    ),
    "sums of the images before": (
        "backward/backward.cu", "backward/reduce.cuh", "a.more ? part + sum : sum", "sum", "backward, copies",
    ),
    "rows of the table of the images before": (
        "backward/backward.cu", "backward/reduce.cuh", "if (a.more) load_eight", "if (false) load_eight",
        "backward, copies",
    ),
    "where a piece's images begin": (
        "backward/backward.cu", "backward/backward.cu", "&t.grad, &t.images, &t.keep", "&t.grad, &t.keep",
        "backward, copies",
    ),
    "whose rows are kept": (
        "backward/backward.cu", "backward/backward.cu", "(plan.heads) + first * p.N", "(plan.heads)",
        "backward, kept copies",
    ),
    "a copied row": (
        "backward/backward.cu", "backward/reduce.cuh", "(b * rows + i) * row", "(b * rows + i + 1) * row",
        "backward, copies",
    ),
    "a block's part of dY": (
        BACKWARD_90, "backward/weight_producers_sm90.cuh", "d / 64 % 2 == rank", "d / 64 % 2 == 0", "backward, pairs",
    ),
    "a stage of dY overwritten": (
        BACKWARD_90, "backward/weight_sm90.cuh", "8 << h.pair_bits", "8", "backward, pairs",
    ),
    "a tile of a pair": (
        BACKWARD_90, "backward/weight_producers_sm90.cuh", " + rank_in_cluster(h.pair_bits);\n    uint32_t line",
        ";\n    uint32_t line", "backward, pairs",
    ),
    "a pair's beginning": (
        BACKWARD_90, "backward/weight_sm90.cuh", "if (h.pair_bits) sync_cluster();  // as", "// as", "backward, pairs",
    ),
    "a block's part of dX's weight": (*IMAGES, "% 2 == rank_in_cluster(h.pair_bits)", "% 2 == 0", "backward, pairs"),
    "dX of a pair": (*IMAGES, "origin(tile.m, origin)", "origin(tile.m & ~1u, origin)", "backward, pairs"),
    "a row of dY": (BACKWARD, "backward/weight_sm80.cuh", "+ row) * LEFT", "+ (row ^ 1)) * LEFT", "backward"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_caught(monkeypatch, name):
    source, *change, case = MUTATIONS[name]
    pixels = "uint8_t, false" if case in BYTES else "half, true"
    # The others take a second to compile, and are not launched
    alone_there = SM90, "launch_sm90<half>(l)", f"launch_wgmma_tile<half, {pixels}>(l)"
    module = build.mutated(source, tuple(change), *[alone_there] * (source == SM90))
    act = CASES[case][1]
    backend.use(monkeypatch, module, gpu_of(case))
    for seed in range(1, 4):
        monkeypatch.setenv("VITKERNELS_HOST_SEED", str(seed))
        if alone(act):
            return
    pytest.fail("no order of the threads shows it")
