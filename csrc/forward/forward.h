// The forward as the bindings call it, its arguments as every kernel takes them, and its kernels by product: declared here, defined
// where their kernels are instantiated, a file for each kind of product so that they compile side by side.
#pragma once

#include "forward/plan.h"
#include "common/patch_layout.h"

namespace vk {

struct ForwardArguments {
    PatchLayout layout;
    const void* images;       // [B, C, F, H, W], read by `layout`
    Dtype image;
    const void* weight;       // [D, weight_row] in the layout's order, of the operands' type; from K on zeros or not read
    int64_t weight_row;
    int weight_chunk;         // bytes of one copy; they divide K and the rows
    const void* centred;      // [2, C] of the sum's type: m and a of y = (x − m)·a; null: pixels as they are
    int C;
    double scale;             // of the sum
    Tensor bias, pos, prefix, keep, out;  // [D], [1|B, N|T+N, D], [1|B, T, D], [B, rows], [B, T+rows, D]
    int64_t B, D, T, N, rows, M, pos_first;  // M = B·rows; pos_first: the table's row of patch 0
    bool shared_positions, own_positions;    // those of a tile's place in the grid, or of each of its patches
    Divisor by_rows;

    // Of the plan
    Divisor by_tiles_n, by_weight_chunks;
    int64_t tiles;            // of the product, and of a cluster; what comes after them writes prefix tokens
    int step_k, steps, lag, stages, chunk, a_bytes, b_pitch, stage_bytes, table_bytes;
    int stage_rows, slot_bytes, segment_bytes, segments;
    Divisor by_segment_chunks, by_row_chunks;  // copies of a segment, of a slot
};

struct ForwardTensors {       // data is null where a tensor is absent
    Tensor images, weight, bias, pos, prefix, keep, centred, out;
    void* scratch;            // of what is planned, aligned to 256 bytes
};

// Launches what was planned on `stream`. Throws std::runtime_error with the problem in its text where CUDA
// reports an error. The tokens must not be empty.
void run_forward(const Problem& p, const ForwardPlan& f, const ForwardTensors& t, Stream stream);

// packed[d, columns] of the weight as forward.cu says, `row` elements of a row of pixels each
void pack_weight(const PatchLayout& layout, int row, const Tensor& weight, int64_t D, void* packed, Dtype to,
                 int64_t columns, int tf32_terms, Stream stream);

// Where these kernels run, as PyTorch names devices: "cuda", or "cpu" where tests emulate them.
const char* device_type();

struct ForwardLaunch {
    const Problem& p;
    const ForwardPlan& plan;
    ForwardArguments arguments;
    int64_t prefixes;         // threads that write prefix tokens
    Stream stream;
};

void forward_sm80_f16(const ForwardLaunch&);
void forward_sm80_bf16(const ForwardLaunch&);
void forward_sm80_tf32(const ForwardLaunch&);
void forward_sm80_f32(const ForwardLaunch&);
void forward_sm80_f64(const ForwardLaunch&);
void forward_sm90_f16(const ForwardLaunch&);
void forward_sm90_bf16(const ForwardLaunch&);
void forward_sm90_tf32(const ForwardLaunch&);
void forward_sm90_f32(const ForwardLaunch&);  // by three products of TF32

}  // namespace vk
