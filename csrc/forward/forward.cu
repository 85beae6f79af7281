// The forward, from tensors to launches.
#include <algorithm>

#include "forward/forward.h"

#include "common/errors.h"
#include "common/launch.h"
#include "common/dtypes.cuh"

namespace vk {

// packed[d, k] = weight[d, element k of a patch], zeros behind a patch's rows where they are padded, and from K on.
// TF32: what it holds of them; with two terms, behind that what it holds of the rest
struct PackArguments {
    PatchLayout layout;
    Divisor by_row;   // of the packed elements of a row of pixels
    Tensor weight;    // [D, C, P_t, P_h, P_w]
    void* packed;     // [D, columns]
    Dtype to;
    int64_t columns, size;
    int tf32_terms;
};

VK_DEVICE void pack_element(const PackArguments& a, int64_t at) {
    int64_t d = at / a.columns;
    int to = static_cast<int>(at - d * a.columns), of_term = static_cast<int>(a.columns) / 2;
    bool rest = a.tf32_terms == 2 && to >= of_term;
    if (rest) to -= of_term;
    int row = a.by_row.div(to), x = to - row * a.by_row.value;
    int k = row * a.layout.P_w + x;
    bool real = x < a.layout.P_w && k < a.layout.K;
    int64_t from = real ? d * a.weight.strides[0] + weight_offset(a.layout, k, a.weight.strides) : 0;
    if (a.to == Dtype::f64)
        return store(a.packed, a.to, at, real ? load<double>(a.weight.data, a.weight.dtype, from) : 0.0);
    float value = real ? load<float>(a.weight.data, a.weight.dtype, from) : 0.0f;
    if (a.tf32_terms) {
        float whole = from_bits(to_tf32(value));
        value = rest ? from_bits(to_tf32(value - whole)) : whole;
    }
    store(a.packed, a.to, at, value);
}

inline constexpr int PACK_THREADS = 256, PACK_EACH = 4;  // elements of a thread

VK_KERNEL(PACK_THREADS, 1) pack_kernel(VK_GRID_CONSTANT PackArguments a) {
    launch_dependents();
    int64_t first = block_index() * (PACK_THREADS * PACK_EACH) + thread_index();
#pragma unroll
    for (int i = 0; i < PACK_EACH; ++i)
        if (first + i * PACK_THREADS < a.size) pack_element(a, first + i * PACK_THREADS);
}

static ForwardArguments arguments_of(const Problem& p, const ForwardPlan& f, const ForwardTensors& t) {
    ForwardArguments a{};
    a.layout = layout_of(p, p.strides);
    a.images = t.images.data, a.image = p.image;
    a.weight = f.pack ? t.scratch : t.weight.data;
    a.weight_row = f.weight_row, a.weight_chunk = f.weight_chunk;
    a.centred = p.normalised ? t.centred.data : nullptr;
    a.C = static_cast<int>(p.C);
    a.scale = p.scale;
    a.bias = t.bias, a.pos = t.pos, a.prefix = t.prefix, a.keep = t.keep, a.out = t.out;
    a.B = p.B, a.D = p.D, a.T = p.T, a.N = p.N, a.rows = p.rows, a.M = p.B * p.rows;
    a.pos_first = p.pos_rows > p.N ? p.T : 0;
    a.own_positions = p.keep || (t.pos.data && t.pos.strides[0]);
    a.shared_positions = t.pos.data && !a.own_positions;
    a.by_rows = Divisor(std::max<int64_t>(p.rows, 1));
    a.by_tiles_n = Divisor(f.tiles_n);
    a.by_weight_chunks = Divisor(f.step_k * size_of(p.compute) / f.weight_chunk);
    a.tiles = f.tiles / f.pair();
    a.step_k = f.step_k, a.steps = f.steps, a.lag = f.lag, a.stages = f.stages, a.chunk = f.chunk, a.a_bytes = f.a_bytes;
    a.b_pitch = f.b_pitch, a.stage_bytes = f.stage_bytes, a.table_bytes = f.table_bytes;
    a.stage_rows = f.stage_rows, a.slot_bytes = f.slot_bytes, a.segment_bytes = f.segment_bytes;
    a.segments = f.segments;
    a.by_segment_chunks = Divisor(f.loader == LoaderKind::rows ? f.segment_bytes / f.chunk : 1);
    a.by_row_chunks = Divisor(f.loader == LoaderKind::rows ? f.segment_bytes / f.chunk * f.segments : 1);
    return a;
}

const char* device_type() {
#if defined(__CUDACC__)
    return "cuda";
#else
    return "cpu";
#endif
}

void pack_weight(const PatchLayout& layout, int row, const Tensor& weight, int64_t D, void* packed, Dtype to,
                 int64_t columns, int tf32_terms, Stream stream) {
    PackArguments a{layout, Divisor(row), weight, packed, to, columns, D * columns, tf32_terms};
    launch(pack_kernel, ceil_div(a.size, PACK_THREADS * PACK_EACH), PACK_THREADS, 0, stream, a, "packing the weight");
}

static void launch_all(const Problem& p, const ForwardPlan& f, const ForwardTensors& t, Stream stream) {
    ForwardLaunch l{p, f, arguments_of(p, f, t), p.B * p.T * ceil_div(p.D, 8), stream};
    if (f.pack && f.tiles) {
        const PatchLayout& layout = l.arguments.layout;
        int row = f.loader >= LoaderKind::copied ? padded(layout).P_w : layout.P_w;
        pack_weight(layout, row, t.weight, p.D, t.scratch, p.compute, f.weight_row, f.tf32_terms, stream);
    }
    switch (p.compute) {
        case Dtype::f16: return f.wgmma ? forward_sm90_f16(l) : forward_sm80_f16(l);
        case Dtype::bf16: return f.wgmma ? forward_sm90_bf16(l) : forward_sm80_bf16(l);
        case Dtype::f32:
            if (f.wgmma) return f.tf32_terms == 1 ? forward_sm90_tf32(l) : forward_sm90_f32(l);
            return p.tf32 ? forward_sm80_tf32(l) : forward_sm80_f32(l);
        default: return forward_sm80_f64(l);
    }
}

void run_forward(const Problem& p, const ForwardPlan& f, const ForwardTensors& t, Stream stream) {
    OnDevice guard(p.device);
    locate_errors([&] { launch_all(p, f, t, stream); }, [&] { return p.text + ", " + f.how; });
}

}  // namespace vk
