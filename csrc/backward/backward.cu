// The backward's plan, its launches in order, and the kernels without a product in them.
#include "backward/backward.h"

#include "backward/images.cuh"
#include "backward/reduce.cuh"
#include "backward/weight_sm80.cuh"
#include "common/errors.h"
#include "backward/weight_sm90.h"
#include "common/launch.h"

namespace vk {

namespace backward {

// In backward_half.cu, backward_bfloat16.cu, backward_float.cu and backward_double.cu
extern template void launch_weight<half>(const WeightArguments&, const WeightPlan&, Stream);
extern template void launch_weight<bfloat16>(const WeightArguments&, const WeightPlan&, Stream);
extern template void launch_weight<tf32>(const WeightArguments&, const WeightPlan&, Stream);
extern template void launch_weight<float>(const WeightArguments&, const WeightPlan&, Stream);
extern template void launch_weight<double>(const WeightArguments&, const WeightPlan&, Stream);
extern template void launch_images<half>(const ImagesArguments&, const ImagesPlan&, Stream);
extern template void launch_images<bfloat16>(const ImagesArguments&, const ImagesPlan&, Stream);
extern template void launch_images<tf32>(const ImagesArguments&, const ImagesPlan&, Stream);
extern template void launch_images<float>(const ImagesArguments&, const ImagesPlan&, Stream);
extern template void launch_images<double>(const ImagesArguments&, const ImagesPlan&, Stream);

namespace {

struct Call {  // one call
    const Problem& p;
    const Backward& plan;
    const BackwardTensors& t;
    Stream stream;

    template <class T>
    T* scratch(int64_t at) const {
        return reinterpret_cast<T*>(static_cast<char*>(t.scratch) + at);
    }
    bool is_double() const { return p.compute == Dtype::f64; }
    // The kernel of this problem's sums
    template <class Arguments>
    void launch_for(void (*of_float)(Arguments), void (*of_double)(Arguments), int64_t blocks, int threads,
                    int shared_bytes, const Arguments& a, const char* what) const {
        launch(is_double() ? of_double : of_float, blocks, threads, shared_bytes, stream, a, what);
    }
    const void* centred() const { return scaling_of(p).normalised ? t.centred.data : nullptr; }
    double factor() const { return scaling_of(p).scaled ? p.scale : 1; }

    Gradient grad() const {
        Gradient g{t.grad.data, t.grad.dtype, t.grad.strides[0], t.grad.strides[1], t.grad.strides[2],
                   p.T, p.N, p.rows, nullptr, nullptr};
        if (plan.indexed) g.heads = scratch<int32_t>(plan.heads), g.nexts = scratch<int32_t>(plan.nexts);
        return g;
    }

    void index() const {
        IndexArguments a{t.keep, p.N, p.rows, scratch<int32_t>(plan.heads), scratch<int32_t>(plan.nexts)};
        launch(index_kernel, p.B, INDEX_THREADS, 0, stream, a, "the index of the kept patches");
    }

    void weight() const {
        if (plan.weight.hopper) {
            auto launch_it = p.compute == Dtype::f16 ? hopper_weight_f16 : hopper_weight_bf16;
            return launch_it({p, plan.weight, t.images, t.grad, static_cast<const float*>(centred()),
                              scratch<float>(plan.weight_parts), stream});
        }
        WeightArguments a{};
        a.walk = make_walk(within_image(p), p.strides);
        a.pixels = plan.weight.pixels, a.pixels.data = t.images.data;
        a.grad = plan.weight.grad, a.grad.data = t.grad.data;
        a.grad_b = t.grad.strides[0], a.grad_n = t.grad.strides[1], a.grad_d = t.grad.strides[2];
        if (p.keep) a.keep = t.keep;
        a.centred = centred();
        a.parts = scratch<void>(plan.weight_parts);
        a.T = p.T, a.N = p.N, a.C = p.C, a.M = p.B * p.rows, a.D = p.D, a.K = p.K;
        a.chunk = plan.weight.chunk, a.by_rows = Divisor(p.rows);
        a.tiles_k = plan.weight.tiles_k, a.tiles = plan.weight.tiles;
        switch (product_of(p)) {
            case Product::f16: return launch_weight<half>(a, plan.weight, stream);
            case Product::bf16: return launch_weight<bfloat16>(a, plan.weight, stream);
            case Product::tf32: return launch_weight<tf32>(a, plan.weight, stream);
            case Product::f32: return launch_weight<float>(a, plan.weight, stream);
            default: return launch_weight<double>(a, plan.weight, stream);
        }
    }

    void sums() const {
        const SumsPlan& s = plan.sums;
        SumsArguments a{grad(), p.B, p.D, s.first, s.last, s.stored, s.table_rows, s.chunk, s.blocks, s.tiles_d,
                        s.lanes, nullptr, nullptr};
        if (s.table_rows > 0) a.table_parts = scratch<void>(plan.table_parts);
        if (t.d_bias.data) a.bias_parts = scratch<void>(plan.bias_parts);
        int shared = t.d_bias.data ? SUMS_THREADS * 8 * sum_bytes(p) : 0;
        launch_for(sums_kernel<float>, sums_kernel<double>, s.splits * s.blocks * s.tiles_d, SUMS_THREADS, shared, a,
                   "the sums over images");
    }

    void finish() const {
        const SumsPlan& s = plan.sums;
        FinishArguments a{};
        a.D = p.D, a.K = p.K, a.scale = factor();
        int64_t blocks = 0;
        if (plan.has_weight) {
            a.walk = make_walk(within_image(p), p.strides);
            a.weight_parts = scratch<void>(plan.weight_parts), a.weight_count = plan.weight.splits;
            a.weight_size = p.D * p.K, a.d_weight = t.d_weight;
            blocks += a.weight_blocks = ceil_div(a.weight_size, FINISH_THREADS);
        }
        if (plan.has_sums) {
            a.table_parts = scratch<void>(plan.table_parts), a.table_count = s.splits;
            a.table_size = s.table_rows * p.D;
            a.pos_from = p.T + p.N - p.pos_rows - s.first, a.prefix_stop = p.T - s.first;
            a.d_pos = t.d_pos, a.d_prefix = t.d_prefix, a.d_bias = t.d_bias;
            blocks += a.table_blocks = ceil_div(a.table_size, FINISH_THREADS);
            a.bias_parts = scratch<void>(plan.bias_parts), a.bias_count = s.splits * s.blocks;
            if (t.d_bias.data) blocks += ceil_div(p.D, FINISH_CHANNELS);
        }
        launch_for(finish_kernel<float>, finish_kernel<double>, blocks, FINISH_THREADS, FINISH_THREADS * sum_bytes(p),
                   a, "the sum of the parts");
    }

    void pack() const {
        PackArguments a{};
        a.walk = make_walk(within_image(p), t.d_images.strides);
        std::copy_n(plan.images.classes, plan.images.count, a.classes);
        a.count = plan.images.count, a.D = p.D, a.size = plan.images.packed;
        a.weight = t.weight, a.packed = scratch<void>(plan.packed), a.compute = p.compute;
        launch_for(pack_kernel<float>, pack_kernel<double>, ceil_div(a.size, PACK_THREADS), PACK_THREADS, 0, a,
                   "the weight in the image's order");
    }

    void images() const {
        ImagesArguments a{};
        a.walk = make_walk(within_image(p), t.d_images.strides);
        std::copy_n(plan.images.classes, plan.images.count, a.classes);
        a.count = plan.images.count, a.M = plan.images.M, a.D = p.D, a.C = p.C, a.N = p.N, a.rows = p.rows;
        for (int i = 0; i < 3; ++i) a.by_cell[i] = Divisor(plan.images.cells[i]);
        a.G_t = static_cast<int>(p.G[0]);
        a.grad = grad();
        a.copied = plan.images.grad, a.copied.data = t.grad.data;
        a.packed = scratch<void>(plan.packed), a.centred = centred(), a.scale = factor(), a.d_images = t.d_images;
        switch (product_of(p)) {
            case Product::f16: return launch_images<half>(a, plan.images, stream);
            case Product::bf16: return launch_images<bfloat16>(a, plan.images, stream);
            case Product::tf32: return launch_images<tf32>(a, plan.images, stream);
            case Product::f32: return launch_images<float>(a, plan.images, stream);
            default: return launch_images<double>(a, plan.images, stream);
        }
    }
};

}  // namespace
}  // namespace backward

Backward plan_backward(const Problem& p, const Gpu& gpu, const BackwardTensors& t) {
    using namespace backward;
    Backward plan{};
    bool bias = t.d_bias.data, pos = t.d_pos.data, prefix = t.d_prefix.data && p.T > 0;
    int64_t sum = sum_bytes(p);
    auto take = [&](int64_t bytes) {
        int64_t at = plan.scratch_bytes;
        plan.scratch_bytes += round_up(bytes, 256);
        return at;
    };
    if ((plan.has_weight = t.d_weight.data)) {
        plan.weight = weight_plan(p, gpu, t.images, t.grad);
        plan.weight_parts = take(plan.weight.splits * p.D * p.K * sum);
    }
    if ((plan.has_sums = bias || pos || prefix)) {
        plan.sums = sums_plan(p, gpu, bias, pos, prefix);
        plan.table_parts = take(plan.sums.splits * plan.sums.table_rows * p.D * sum);
        if (bias) plan.bias_parts = take(plan.sums.splits * plan.sums.blocks * p.D * sum);
    }
    if ((plan.has_images = t.d_images.data)) {
        plan.images = images_plan(p, t.d_images, t.grad);
        plan.packed = take(plan.images.packed * size_of(p.compute));
    }
    if ((plan.indexed = p.keep && (bias || pos || plan.has_images))) {
        plan.heads = take(p.B * p.N * 4);
        plan.nexts = take(p.B * p.rows * 4);
    }
    return plan;
}

static void launch_all(backward::Call run, const Backward& plan) {
    if (plan.indexed) run.index();
    if (plan.has_weight) run.weight();
    if (plan.has_sums) run.sums();
    if (plan.has_weight || plan.has_sums) run.finish();
    if (plan.has_images && plan.images.packed > 0) run.pack();
    if (plan.has_images) run.images();
}

void run_backward(const Problem& p, const Backward& plan, const BackwardTensors& t, Stream stream) {
    locate_errors([&] { launch_all({p, plan, t, stream}, plan); }, [&] { return "the gradients of " + describe(p); });
}

// All counts of one axis, and what a grid numbers, are 32 bits; offsets are 64.
std::string backward_refused(const Problem& p) {
    using namespace backward;
    auto number = [](int64_t n) { return std::to_string(n); };
    Problem q = within_image(p);
    int64_t size[] = {p.F, p.H, p.W}, cells = p.B;
    const char* axes[] = {"F", "H", "W"};
    for (int i = 0; i < 3; ++i) {
        int64_t wide = i == 2 ? p.C : 1, most = (size[i] + 2 * p.pad[i] + q.S[i]) * wide;
        if (most >= LIMIT)
            return std::string(axes[i]) + " + 2·padding + stride" + (i == 2 ? ", times C," : "") + " is " +
                   number(most) + ", which does not fit 31 bits";
        cells *= ceil_div(size[i] + p.pad[i], q.S[i]);
        if (cells >= LIMIT) return number(cells) + " cells of B·image do not fit 31 bits";
    }
    struct { const char* name; int64_t value; } counts[] = {
        {"B·rows", p.B * p.rows}, {"N", p.N}, {"K", p.K}, {"D", p.D}, {"T", p.T}, {"rows", p.rows},
        {"tiles of dW", ceil_div(p.D, 32) * ceil_div(p.K, 32)},
        {"parts of dW", ceil_div(p.D * p.K, FINISH_THREADS)},
        {"channels of a cell", p.C * q.S[0] * q.S[1] * q.S[2]},
        {"pixels, in tiles of 64 × 64,", ceil_div(cells, 64) * ceil_div(p.C * q.S[0] * q.S[1] * q.S[2] + 8 * 64, 64)},
        {"windows × steps of channels", ceil_div(q.P[0], q.S[0]) * ceil_div(q.P[1], q.S[1]) *
                                            ceil_div(q.P[2], q.S[2]) * ceil_div(p.D, 16)},
        {"elements of the table", (p.T + p.N) * p.D / FINISH_THREADS},
    };
    for (auto& count : counts)
        if (count.value >= LIMIT) return number(count.value) + " " + count.name + " do not fit 31 bits";
    return "";
}

}  // namespace vk
