// The backward, from tensors to launches in order.
#include <algorithm>

#include "backward/backward.h"

#include "backward/images.cuh"
#include "backward/images_sm90.h"
#include "backward/reduce.cuh"
#include "backward/weight_sm80.cuh"
#include "common/errors.h"
#include "backward/weight_sm90.h"
#include "common/launch.h"
#include "forward/forward.h"

namespace vk {

namespace backward {

// In instances/
VK_PRODUCTS(extern, half)
VK_PRODUCTS(extern, bfloat16)
VK_PRODUCTS(extern, tf32)
VK_PRODUCTS(extern, float)
VK_PRODUCTS(extern, double)

namespace {

struct Call {  // one call, or the images of it from `first` on, which p and t have
    const Problem& p;
    const BackwardPlan& plan;
    const BackwardTensors& t;
    Stream stream;
    int64_t first = 0;

    template <class T>
    T* scratch(int64_t at) const {
        return reinterpret_cast<T*>(static_cast<char*>(t.scratch) + at);
    }
    bool is_double() const { return p.compute == Dtype::f64; }
    // The kernel of this problem's sums
    template <class Arguments>
    void launch_for(void (*of_float)(Arguments), void (*of_double)(Arguments), int64_t blocks, int threads,
                    int shared_bytes, const Arguments& a, const char* what, Early early = {}) const {
        launch(is_double() ? of_double : of_float, blocks, threads, shared_bytes, stream, a, what, 1, early);
    }
    // act(T{}) of the operands' type
    template <class Act>
    void with_product(const Act& act) const {
        switch (p.compute) {
            case Dtype::f16: return act(half{});
            case Dtype::bf16: return act(bfloat16{});
            case Dtype::f32: return p.tf32 ? act(tf32{}) : act(float{});
            default: return act(double{});
        }
    }
    const void* centred() const { return p.normalised ? t.centred.data : nullptr; }

    Gradient grad() const {
        Gradient g{t.grad.data, t.grad.dtype, t.grad.strides[0], t.grad.strides[1], t.grad.strides[2],
                   p.T, p.N, p.rows, nullptr, nullptr};
        if (plan.indexed) {
            g.heads = scratch<int32_t>(plan.heads) + first * p.N;
            g.nexts = scratch<int32_t>(plan.nexts) + first * p.rows;
        }
        return g;
    }

    void index() const {
        IndexArguments a{t.keep, p.N, p.rows, scratch<int32_t>(plan.heads), scratch<int32_t>(plan.nexts)};
        launch(index_kernel, p.B, INDEX_THREADS, 0, stream, a, "the index of the kept patches");
    }

    void weight() const {
        if (plan.weight.wgmma) {
            auto launch_it = p.compute == Dtype::f16 ? weight_sm90_f16 : weight_sm90_bf16;
            Tensor copies{scratch<void>(plan.copies), p.compute, {p.rows * plan.copy_row, plan.copy_row, 1}};
            bool copied = plan.copy_row > 0;
            return launch_it({p, plan.weight, t.images, copied ? copies : t.grad, copied ? 0 : p.T, t.keep,
                              static_cast<const float*>(centred()), scratch<float>(plan.weight_parts), first > 0, stream});
        }
        WeightArguments a{};
        a.layout = layout_of(p, p.strides);
        a.pixels = plan.weight.pixels(t.images), a.grad = plan.weight.grad(t.grad);
        a.grad_b = t.grad.strides[0], a.grad_n = t.grad.strides[1], a.grad_d = t.grad.strides[2];
        if (p.keep) a.keep = t.keep;
        a.centred = centred();
        a.parts = scratch<void>(plan.weight_parts);
        a.T = p.T, a.N = p.N, a.C = p.C, a.M = p.B * p.rows, a.D = p.D, a.K = p.K;
        a.chunk = plan.weight.chunk, a.by_rows = Divisor(p.rows);
        a.tiles_k = plan.weight.tiles_k, a.tiles = plan.weight.tiles;
        with_product([&](auto type) { launch_weight<decltype(type)>(a, plan.weight, stream); });
    }

    void sums() const {
        const SumsPlan& s = plan.sums;
        SumsArguments a{grad(), p.B, p.D, s.first, s.last, s.stored, s.table_rows, s.chunk, s.blocks, s.tiles_d,
                        s.lanes, nullptr, nullptr, first > 0, scratch<void>(plan.copies), plan.copy_row};
        if (s.table_rows > 0) a.table_parts = scratch<void>(plan.table_parts);
        if (t.d_bias.data) a.bias_parts = scratch<void>(plan.bias_parts);
        int shared = t.d_bias.data ? SUMS_THREADS * 8 * sum_bytes(p) : 0;
        auto of_float = plan.copy_row == 0         ? sums_kernel<float>
                        : p.compute == Dtype::f16 ? sums_kernel<float, half>
                                                  : sums_kernel<float, bfloat16>;
        launch_for(of_float, sums_kernel<double>, s.splits * s.blocks * s.tiles_d, SUMS_THREADS, shared, a,
                   "the sums over images");
    }

    void finish() const {
        const SumsPlan& s = plan.sums;
        FinishArguments a{};
        a.D = p.D, a.K = p.K, a.scale = p.scale;
        int64_t blocks = 0;
        Early parts{};
        if (plan.has_weight) {
            a.layout = layout_of(p, p.strides);
            a.weight_parts = scratch<void>(plan.weight_parts), a.weight_count = plan.weight.splits;
            a.weight_size = p.D * p.K, a.d_weight = t.d_weight;
            blocks += ceil_div(a.weight_size, FINISH_THREADS);
            if (plan.weight.wgmma) parts = {a.weight_parts, plan.weight.splits * a.weight_size * int64_t{sizeof(float)}};
        }
        if (plan.has_sums) {
            a.table_parts = scratch<void>(plan.table_parts), a.table_count = s.splits;
            a.table_size = s.table_rows * p.D;
            a.pos_from = p.T + p.N - p.pos_rows - s.first, a.prefix_stop = p.T - s.first;
            a.d_pos = t.d_pos, a.d_prefix = t.d_prefix, a.d_bias = t.d_bias;
            blocks += a.table_blocks = ceil_div(a.table_size, FINISH_THREADS);
            a.bias_parts = scratch<void>(plan.bias_parts), a.bias_count = s.splits * s.blocks;
            if (t.d_bias.data) blocks += a.bias_blocks = ceil_div(p.D, FINISH_CHANNELS);
        }
        launch_for(finish_kernel<float>, finish_kernel<double>, blocks, FINISH_THREADS, FINISH_THREADS * sum_bytes(p),
                   a, "the sum of the parts", parts);
    }

    void pack() const {
        PackArguments a{};
        a.layout = layout_of(p, t.d_images.strides);
        std::copy_n(plan.images.classes, plan.images.count, a.classes);
        a.count = plan.images.count, a.D = p.D, a.size = plan.images.packed;
        a.weight = t.weight, a.packed = scratch<void>(plan.packed), a.compute = p.compute;
        launch_for(pack_kernel<float>, pack_kernel<double>, ceil_div(a.size, PACK_THREADS), PACK_THREADS, 0, a,
                   "the weight in the image's order");
    }

    void wgmma_images() const {
        PatchLayout layout = layout_of(p, t.d_images.strides);
        void* packed = scratch<void>(plan.packed);
        pack_weight(layout, padded(layout).P_w, t.weight, p.D, packed, p.compute, plan.wgmma_images.weight_row, 0, stream);
        auto launch_it = p.compute == Dtype::f16 ? images_sm90_f16 : images_sm90_bf16;
        launch_it({p, plan.wgmma_images, t.grad, packed, static_cast<const float*>(centred()), t.d_images, stream});
    }

    void images() const {
        ImagesArguments a{};
        a.layout = layout_of(p, t.d_images.strides);
        std::copy_n(plan.images.classes, plan.images.count, a.classes);
        a.count = plan.images.count, a.M = plan.images.M, a.D = p.D, a.C = p.C, a.N = p.N, a.rows = p.rows;
        for (int i = 0; i < 3; ++i) a.by_cell[i] = Divisor(plan.images.cells[i]);
        a.G_t = static_cast<int>(p.G[0]);
        a.grad = grad();
        a.copied = plan.images.grad(t.grad);
        a.packed = scratch<void>(plan.packed), a.centred = centred(), a.scale = p.scale, a.d_images = t.d_images;
        with_product([&](auto type) { launch_images<decltype(type)>(a, plan.images, stream); });
    }
};

}  // namespace
}  // namespace backward

// The parts of sums and of dW, of `piece` images after the other
static void launch_parts(const backward::Call& all) {
    const backward::BackwardPlan& plan = all.plan;
    for (int64_t b = 0; b < all.p.B; b += plan.piece) {
        Problem p = all.p;
        BackwardTensors t = all.t;
        p.B = std::min(plan.piece, all.p.B - b);
        for (Tensor* each : {&t.grad, &t.images, &t.keep})
            if (each->data) each->data = static_cast<char*>(each->data) + b * each->strides[0] * size_of(each->dtype);
        backward::Call piece{p, plan, t, all.stream, b};
        if (plan.has_sums) piece.sums();
        if (plan.has_weight) piece.weight();
    }
}

static void launch_all(const backward::Call& run) {
    const backward::BackwardPlan& plan = run.plan;
    if (plan.indexed) run.index();
    if (plan.has_weight || plan.has_sums) launch_parts(run);
    if (plan.has_weight || plan.has_sums) run.finish();
    if (plan.has_images && plan.images.packed > 0) run.pack();
    if (plan.has_images) run.images();
    if (plan.has_wgmma_images) run.wgmma_images();
}

void run_backward(const Problem& p, const backward::BackwardPlan& plan, const BackwardTensors& t, Stream stream) {
    OnDevice guard(p.device);
    locate_errors([&] { launch_all({p, plan, t, stream}); }, [&] { return "the gradients of " + p.text; });
}

}  // namespace vk
