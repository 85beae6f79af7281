// weight_kernel: parts of dW[d, k] = Σ_m dY[m, d]·x[m, k], where x is read from the image and no matrix of patches is.
//
// A block has a tile of channels × elements of a patch, over one part of the patches. In shared memory both operands
// have the patch outermost, as they have it in global memory.
#pragma once

#include "backward/common.cuh"
#include "common/errors.h"
#include "common/launch.h"

namespace vk::backward {

struct WeightArguments {
    PatchLayout layout;
    Operand pixels;        // [B, C, F, H, W]
    Operand grad;          // [B, T + rows, D]
    int64_t grad_b, grad_n, grad_d;
    Tensor keep;          // [B, rows]
    const void* centred;  // [2, C] of sums; null: pixels as they are
    void* parts;          // [splits, D, K] of sums
    int64_t T, N, C, M, D, K;
    int64_t chunk;        // patches of a part
    Divisor by_rows;
    int64_t tiles_k, tiles;
};

// A step's patch: where its pixels and its dY begin.
struct PatchRow {
    int64_t pixel, grad;
    int f, h, w;
    bool real;
};
struct PatchColumn {
    int64_t offset;
    int t, y, x;
    bool real;
};
static_assert(sizeof(PatchRow) == 32 && sizeof(PatchColumn) == 24, "as backward_plan.py counts them");

template <class T, int SIZE>
struct WeightBlock {
    using Value = typename Kind<T>::Value;
    using Sum = typename Kind<T>::Sum;
    static constexpr Product PRODUCT = product_as<T>;
    static constexpr Shape SHAPE = weight_shape(PRODUCT, SIZE);
    static constexpr int BM = SHAPE.BM, BN = SHAPE.BN, BK = SHAPE.BK, THREADS = threads_of(SHAPE);
    static constexpr int WM = BM / SHAPE.warps_m, WN = BN / SHAPE.warps_n;
    static constexpr int LEFT = pitch_across(BM), RIGHT = pitch_across(BN);
    static constexpr int BATCH = ROW_STEPS * BK;  // patches looked up at once
    static_assert(STAGES - 2 >= 1 && STAGES - 2 < ROW_STEPS, "a batch is looked up when the one before last is done");

    const WeightArguments& a;
    int d0, k0, first, stop;  // channels, elements, patches
    bool padded;

    VK_DEVICE explicit WeightBlock(const WeightArguments& a) : a(a), padded(is_padded(a.layout)) {
        int64_t tile = block_index() % a.tiles, split = block_index() / a.tiles;
        d0 = static_cast<int>(tile / a.tiles_k) * BM, k0 = static_cast<int>(tile % a.tiles_k) * BN;
        first = static_cast<int>(split * a.chunk), stop = static_cast<int>(least(first + a.chunk, a.M));
    }

    // In shared memory; at fixed places, so that no register holds them.
    static constexpr int COLUMNS_AT = 0, CENTRE_AT = COLUMNS_AT + BN * sizeof(PatchColumn);
    static constexpr int ROWS_AT = CENTRE_AT + 2 * BN * sizeof(Sum);
    static constexpr int LEFT_AT = ROWS_AT + 2 * BATCH * sizeof(PatchRow);
    static constexpr int RIGHT_AT = LEFT_AT + STAGES * BK * LEFT * sizeof(Value);
    static constexpr int RAW_AT = RIGHT_AT + STAGES * BK * RIGHT * sizeof(Value);

    template <class X>
    VK_DEVICE static X* shared(int at) {
        return reinterpret_cast<X*>(shared_memory() + at);
    }
    VK_DEVICE PatchColumn& column_of(int column) const { return shared<PatchColumn>(COLUMNS_AT)[column]; }
    VK_DEVICE Sum& centre(int which, int column) const { return shared<Sum>(CENTRE_AT)[which * BN + column]; }
    VK_DEVICE PatchRow& row_of(int step, int row) const {  // two batches
        return shared<PatchRow>(ROWS_AT)[step / ROW_STEPS % 2 * BATCH + step % ROW_STEPS * BK + row];
    }
    VK_DEVICE Value* left_at(int step, int row, int column) const {
        return shared<Value>(LEFT_AT) + (step % STAGES * BK + row) * LEFT + column;
    }
    VK_DEVICE Value* right_at(int step, int row, int column) const {
        return shared<Value>(RIGHT_AT) + (step % STAGES * BK + row) * RIGHT + column;
    }
    // Octets as they are in global memory
    VK_DEVICE char* raw_pixels_at(int step, int octet) const {
        return shared<char>(RAW_AT) + ((step % STAGES * (BK * BN) + 8 * octet) << a.pixels.shift);
    }
    VK_DEVICE char* raw_grad_at(int step, int octet) const {
        int pixels = a.pixels.loader == LoaderKind::raw ? (STAGES * BK * BN) << a.pixels.shift : 0;
        return shared<char>(RAW_AT) + pixels + ((step % STAGES * (BK * BM) + 8 * octet) << a.grad.shift);
    }

    VK_DEVICE void find_columns() {
        for (int i = thread_index(); i < BN; i += THREADS) {
            PatchColumn c{0, 0, 0, 0, k0 + i < a.K};
            int k = c.real ? k0 + i : 0;
            Element e = element_of(a.layout, k);
            if (c.real) c.offset = e.offset, c.t = e.t, c.y = e.y, c.x = e.x;
            column_of(i) = c;
            if (a.centred) {
                const Sum* centred = static_cast<const Sum*>(a.centred);
                int channel = channel_of(a.layout, k);
                centre(0, i) = centred[channel], centre(1, i) = centred[a.C + channel];
            }
        }
    }

    VK_DEVICE void find_rows(int batch) {
        for (int i = thread_index(); i < BATCH; i += THREADS) {
            int m = first + batch * BATCH + i;
            PatchRow row{0, 0, 0, 0, 0, m < stop};
            if (row.real) {
                int64_t b = a.by_rows.div(static_cast<uint32_t>(m)), token = m - b * a.by_rows.value, n = token;
                if (a.keep.data)
                    n = load_index(a.keep.data, a.keep.dtype, b * a.keep.strides[0] + token * a.keep.strides[1]);
                row.real = n >= 0 && n < a.N;
                Corner corner = corner_of(a.layout, b, row.real ? n : 0);
                row.pixel = corner.offset, row.f = corner.f, row.h = corner.h, row.w = corner.w;
                row.grad = b * a.grad_b + (a.T + token) * a.grad_n;
            }
            row_of(batch * ROW_STEPS, i) = row;
        }
    }

    VK_DEVICE bool is_there(const PatchRow& r, const PatchColumn& c) const {
        int f = r.f + c.t, h = r.h + c.y, x = r.w + c.x;
        return r.real && c.real &&
               (!padded || (f >= 0 && f < a.layout.F && h >= 0 && h < a.layout.H && x >= 0 && x < a.layout.W));
    }

    // Each of the thread's octets of a step: `act(octet, row, column)`
    template <int COLUMNS, class Act>
    VK_DEVICE void octets(const Act& act) const {
        constexpr int ACROSS = COLUMNS / 8;
#pragma unroll 1
        for (int i = 0; i < BK * ACROSS / THREADS; ++i) {
            int octet = thread_index() + i * THREADS;
            act(octet, octet / ACROSS, octet % ACROSS * 8);
        }
    }
    template <class From>
    VK_DEVICE void gather(Sum (&values)[4], const PatchRow& row, const PatchColumn* column) const {
        const From* image = static_cast<const From*>(a.pixels.data) + row.pixel;
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = is_there(row, column[j]) ? to<Sum>(image[column[j].offset]) : 0;
    }
    VK_DEVICE void gather(Sum (&values)[4], const PatchRow& row, const PatchColumn* column) const {
        switch (a.pixels.dtype) {
            case Dtype::u8: return gather<uint8_t>(values, row, column);
            case Dtype::f16: return gather<half>(values, row, column);
            case Dtype::bf16: return gather<bfloat16>(values, row, column);
            case Dtype::f32: return gather<float>(values, row, column);
            default: return gather<double>(values, row, column);
        }
    }

    // What is padded is 0 among normalised pixels, not a pixel that is 0.
    template <int COUNT>
    VK_DEVICE void put_pixels(int step, int row, int column, Sum (&values)[COUNT]) const {
        if (a.centred) {
            const PatchRow& r = row_of(step, row);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                Sum y = (values[j] - centre(0, column + j)) * centre(1, column + j);
                values[j] = is_there(r, column_of(column + j)) ? y : 0;
            }
        }
        put(right_at(step, row, column), values);
    }

    VK_DEVICE void start_pixels(int step) const {
        octets<BN>([&](int octet, int row, int column) {
            const PatchRow& r = row_of(step, row);
            if (a.pixels.loader == LoaderKind::each) {
#pragma unroll 1
                for (int j = 0; j < 8; j += 4) {  // as many addresses as there are registers for, beside the sums
                    Sum values[4];
                    gather(values, r, &column_of(column + j));
                    put_pixels(step, row, column + j, values);
                }
            } else {
                bool straight = a.pixels.loader == LoaderKind::straight;
                char* shared = straight ? reinterpret_cast<char*>(right_at(step, row, column))
                                        : raw_pixels_at(step, octet);
                copy_octet(shared, a.pixels, [&](int j) {
                    const PatchColumn& c = column_of(column + j);
                    return Run{r.pixel + c.offset, is_there(r, c) ? 8 : 0};
                });
            }
        });
    }

    VK_DEVICE void start_grad(int step) const {
        octets<BM>([&](int octet, int row, int column) {
            const PatchRow& r = row_of(step, row);
            int count = r.real ? clamp_eight(a.D - d0 - column) : 0;
            int64_t at = r.grad + int64_t{d0 + column} * a.grad_d;
            if (a.grad.loader == LoaderKind::each) {
                Sum values[8];
                clear(values);
                if (count > 0) load_eight(values, a.grad.data, a.grad.dtype, at, a.grad_d, count);
                put(left_at(step, row, column), values);
            } else {
                bool straight = a.grad.loader == LoaderKind::straight;
                char* shared = straight ? reinterpret_cast<char*>(left_at(step, row, column))
                                        : raw_grad_at(step, octet);
                copy_octet(shared, a.grad, [&](int j) { return Run{at + j, j < count ? count - j : 0}; });
            }
        });
    }

    VK_DEVICE void start(int step, int steps) {
        if (step < steps) {
            // By now all have converted what the batch before this one was for.
            if (step % ROW_STEPS == STAGES - 2) find_rows(step / ROW_STEPS + 1);
            start_pixels(step);
            start_grad(step);
        }
        copy_commit();
    }

    // What the thread itself has copied, to what the product takes
    VK_DEVICE void convert(int step) const {
        if (a.pixels.loader == LoaderKind::raw)
            octets<BN>([&](int octet, int row, int column) {
                Sum values[8];
                read_octet(values, raw_pixels_at(step, octet), a.pixels.dtype);
                put_pixels(step, row, column, values);
            });
        if (a.grad.loader == LoaderKind::raw)
            octets<BM>([&](int octet, int row, int column) {
                Sum values[8];
                read_octet(values, raw_grad_at(step, octet), a.grad.dtype);
                put(left_at(step, row, column), values);
            });
    }

    VK_DEVICE void run() {
        int steps = (stop - first + BK - 1) / BK;
        int warp = warp_index(), row = warp / SHAPE.warps_n * WM, column = warp % SHAPE.warps_n * WN;
        WarpTile<T, WM, WN> sums;
        sums.clear();
        find_columns();
        find_rows(0);
        sync_block();
        for (int step = 0; step < STAGES - 1; ++step) start(step, steps);
        for (int step = 0; step < steps; ++step) {
            copy_wait<STAGES - 2>();
            convert(step);
            sync_block();
            start(step + STAGES - 1, steps);
            auto l = across<T>(left_at(step, 0, 0), LEFT);
            auto r = across<T>(right_at(step, 0, 0), RIGHT);
#pragma unroll
            for (int k = 0; k < BK; k += sums.K_STEP) sums.step(l, row, r, column, k);
        }
        copy_wait<0>();
        sync_block();
        int64_t split = block_index() / a.tiles;
        Sum* parts = static_cast<Sum*>(a.parts) + split * a.D * a.K;
        write_tile<WM, WN>(sums, shared<Sum>(LEFT_AT), [&](int i, int j, const Sum(&octet)[8]) {
            int64_t d = d0 + row + i, k = k0 + column + j;
            if (d < a.D && k < a.K) store_eight(parts + d * a.K + k, octet, clamp_eight(a.K - k));
        });
    }
};

template <class T, int SIZE>
VK_KERNEL(threads_of(weight_shape(product_as<T>, SIZE)), weight_shape(product_as<T>, SIZE).resident)
weight_kernel(VK_GRID_CONSTANT WeightArguments a) {
    WeightBlock<T, SIZE>(a).run();
}

template <class T>
void launch_weight(const WeightArguments& a, const WeightPlan& plan, Stream stream) {
    auto launch_size = [&](auto kernel, Shape s) {
        launch(kernel, plan.blocks, threads_of(s), plan.shared_bytes, stream, a, "the gradient of the weight");
    };
    constexpr Shape large = weight_shape(product_as<T>, 0), small = weight_shape(product_as<T>, 1);
    if (plan.tile.is(large)) return launch_size(weight_kernel<T, 0>, large);
    if (plan.tile.is(small)) return launch_size(weight_kernel<T, 1>, small);
    no_kernel(plan.tile.BM, plan.tile.BN);
}

}  // namespace vk::backward
