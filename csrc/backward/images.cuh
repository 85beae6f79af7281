// images_kernel: dX = dY·W. A block has a tile of cells (images_plan.py) × pixels of one class, each summed over the
// windows that saw it and over the channels; so every pixel is written once, and 0 where no patch saw it.
// pack_kernel: the weight in the order in which that reads it.
#pragma once

#include "backward/common.cuh"
#include "common/launch.h"

namespace vk::backward {

struct PackArguments {
    PatchLayout layout;             // of d_images
    PixelClass classes[8];
    int count;
    int64_t D, size;       // size: elements of `packed`
    Tensor weight;         // [D, C, P_t, P_h, P_w]
    void* packed;          // for each class [windows, D, pitch], of the product's type
    Dtype compute;
};

struct ImagesArguments {
    PatchLayout layout;             // of d_images
    PixelClass classes[8];
    int count;
    int64_t M, D, C, N, rows;
    Divisor by_cell[3];    // cells of an image along (t, y, x)
    int G_t;
    Gradient grad;         // [B, T + rows, D]
    Operand copied;         // the same, where it is of the product's type
    const void* packed;
    const void* centred;   // [2, C] of sums; null: pixels as they are
    double scale;          // of the sum
    Tensor d_images;       // [B, C, F, H, W]
};

inline constexpr int PACK_THREADS = 256;

VK_DEVICE Element pixel_of(const PixelClass& c, int column, int& channel) {
    uint32_t row = c.by_size[2].div(column), frame = c.by_size[1].div(row);
    channel = static_cast<int>(c.by_size[0].div(frame));
    Element e{};
    e.x = c.first[2] + column - static_cast<int>(row * c.by_size[2].value);
    e.y = c.first[1] + static_cast<int>(c.by_size[1].mod(row));
    e.t = c.first[0] + static_cast<int>(c.by_size[0].mod(frame));
    return e;
}
VK_DEVICE void window_of(const PixelClass& c, int window, int (&j)[3]) {
    uint32_t row = c.by_windows[2].div(window);
    j[2] = static_cast<int>(c.by_windows[2].mod(window));
    j[1] = static_cast<int>(c.by_windows[1].mod(row));
    j[0] = static_cast<int>(c.by_windows[1].div(row));
}

template <class Sum>
VK_KERNEL(PACK_THREADS, 4) pack_kernel(VK_GRID_CONSTANT PackArguments a) {
    int64_t at = block_index() * PACK_THREADS + thread_index();
    if (at >= a.size) return;
    int which = 0;
    while (which + 1 < a.count && at >= a.classes[which + 1].packed) ++which;
    const PixelClass& c = a.classes[which];
    int64_t row = (at - c.packed) / c.pitch, window = row / a.D, d = row - window * a.D;
    int column = static_cast<int>(at - c.packed - row * c.pitch);
    Sum value = 0;
    if (column < c.columns) {
        int channel, j[3];
        Element e = pixel_of(c, column, channel);
        window_of(c, static_cast<int>(window), j);
        int t = e.t + j[0] * a.layout.S_t, y = e.y + j[1] * a.layout.S_h, x = e.x + j[2] * a.layout.S_w;
        int k = ((channel * a.layout.P_t + t) * a.layout.P_h + y) * a.layout.P_w + x;
        value = load<Sum>(a.weight.data, a.weight.dtype,
                          d * a.weight.strides[0] + weight_offset(a.layout, k, a.weight.strides));
    }
    store(a.packed, a.compute, at, value);
}

struct CellRow {
    int64_t pixel;  // of d_images, where the cell begins
    int b;          // −1: no cell
    int q[3];
};
template <class Sum>
struct PixelColumn {
    int64_t offset;
    int t, y, x;    // t < 0: no pixel
    Sum factor;
};
static_assert(sizeof(CellRow) <= 32 && sizeof(PixelColumn<double>) <= 32, "as images_plan.py counts them");

template <class T>
struct ImagesBlock {
    using Value = typename Kind<T>::Value;
    using Sum = typename Kind<T>::Sum;
    static constexpr Shape SHAPE = images_shape(product_as<T>);
    static constexpr int BM = SHAPE.BM, BN = SHAPE.BN, BK = SHAPE.BK, THREADS = threads_of(SHAPE);
    static constexpr int WM = BM / SHAPE.warps_m, WN = BN / SHAPE.warps_n;
    static constexpr int LEFT = pitch_along(product_as<T>, BK), RIGHT = pitch_across(BN);
    using Column = PixelColumn<Sum>;

    const ImagesArguments& a;
    const PixelClass& c;
    int64_t m0;
    int n0, steps_d;
    CellRow* cells;         // [BM]
    Column* columns;        // [BN]
    Value *left, *right;    // [STAGES, BM, LEFT], [STAGES, BK, RIGHT]

    VK_DEVICE ImagesBlock(const ImagesArguments& a, const PixelClass& c) : a(a), c(c) {
        int64_t tile = block_index() - c.first_block, row = tile / c.tiles;
        m0 = row * BM, n0 = static_cast<int>(tile - row * c.tiles) * BN;
        steps_d = static_cast<int>(ceil_div(a.D, BK));
        char* memory = shared_memory();
        cells = reinterpret_cast<CellRow*>(memory);
        columns = reinterpret_cast<Column*>(memory + BM * 32);
        left = reinterpret_cast<Value*>(memory + BM * 32 + BN * 32);
        right = left + STAGES * BM * LEFT;
    }

    VK_DEVICE void find() {
        const PatchLayout& w = a.layout;
        for (int i = thread_index(); i < BM; i += THREADS) {
            CellRow r{0, -1, {0, 0, 0}};
            if (m0 + i < a.M) {
                uint32_t m = static_cast<uint32_t>(m0 + i), line = a.by_cell[2].div(m), frame = a.by_cell[1].div(line);
                r.q[2] = static_cast<int>(a.by_cell[2].mod(m)), r.q[1] = static_cast<int>(a.by_cell[1].mod(line));
                r.q[0] = static_cast<int>(a.by_cell[0].mod(frame)), r.b = static_cast<int>(a.by_cell[0].div(frame));
                r.pixel = r.b * w.b + (int64_t{r.q[0]} * w.S_t - w.pad_t) * w.f +
                          (int64_t{r.q[1]} * w.S_h - w.pad_h) * w.h + (int64_t{r.q[2]} * w.S_w - w.pad_w) * w.w;
            }
            cells[i] = r;
        }
        for (int i = thread_index(); i < BN; i += THREADS) {
            Column column{0, -1, 0, 0, static_cast<Sum>(a.scale)};
            if (n0 + i < c.columns) {
                int channel;
                Element e = pixel_of(c, n0 + i, channel);
                column.offset = channel * w.c + e.t * w.f + e.y * w.h + e.x * w.w;
                column.t = e.t, column.y = e.y, column.x = e.x;
                if (w.channels_last) channel = static_cast<int>(w.by_channel.mod(e.x));
                if (a.centred) column.factor = static_cast<const Sum*>(a.centred)[a.C + channel];
            }
            columns[i] = column;
        }
    }

    VK_DEVICE Value* left_at(int step) const { return left + step % STAGES * (BM * LEFT); }
    VK_DEVICE Value* right_at(int step) const { return right + step % STAGES * (BK * RIGHT); }

    // Of the window j cells before it, dY's channels d … d + 7, where that window is in the grid.
    VK_DEVICE void start_grad(int step, const int (&j)[3], int64_t d0) const {
        constexpr int ACROSS = BK / 8;
#pragma unroll
        for (int i = 0; i < BM * ACROSS / THREADS; ++i) {
            int octet = thread_index() + i * THREADS, row = octet / ACROSS, column = octet % ACROSS * 8;
            const CellRow& r = cells[row];
            int t = r.q[0] - j[0], y = r.q[1] - j[1], x = r.q[2] - j[2];
            bool seen = r.b >= 0 && t >= 0 && t < a.G_t && y >= 0 && y < a.layout.G_h && x >= 0 && x < a.layout.G_w;
            int64_t n = (t * a.layout.G_h + y) * a.layout.G_w + x, d = d0 + column;
            int count = seen ? clamp_eight(a.D - d) : 0;
            Value* to = left_at(step) + row * LEFT + column;
            if (a.copied.loader == LoaderKind::straight) {
                int64_t at = r.b * a.grad.b + (a.grad.T + n) * a.grad.n + d;
                copy_octet(reinterpret_cast<char*>(to), a.copied,
                           [&](int e) { return Run{at + e, e < count ? count - e : 0}; });
            } else {
                Sum total[8];
                clear(total);
                if (count > 0) a.grad.add_patch(total, r.b, n, d, count);
                put(to, total);
            }
        }
    }

    VK_DEVICE void start_weight(int step, int64_t window, int64_t d0) const {
        constexpr int ACROSS = BN / 8, CHUNK = 16 / sizeof(Value);
        const Value* packed = static_cast<const Value*>(a.packed) + c.packed;
#pragma unroll
        for (int i = 0; i < BK * ACROSS / THREADS; ++i) {
            int octet = thread_index() + i * THREADS, row = octet / ACROSS, column = octet % ACROSS * 8;
            bool real = d0 + row < a.D && n0 + column < c.pitch;
            const Value* from = packed + (real ? (window * a.D + d0 + row) * c.pitch + n0 + column : 0);
            Value* to = right_at(step) + row * RIGHT + column;
#pragma unroll
            for (int e = 0; e < 8; e += CHUNK) copy_async<16>(to + e, from + (real ? e : 0), real ? 16 : 0);
        }
    }

    VK_DEVICE void start(int step, int steps) const {
        if (step < steps) {
            int window = step / steps_d, j[3];
            int64_t d0 = int64_t{step - window * steps_d} * BK;
            window_of(c, window, j);
            start_grad(step, j, d0);
            start_weight(step, window, d0);
        }
        copy_commit();
    }

    VK_DEVICE void write(int row, int column, const Sum (&sums)[8]) const {
        const CellRow& r = cells[row];
        const PatchLayout& w = a.layout;
        if (r.b < 0) return;
        const Column* first = columns + column;
        int f0 = r.q[0] * w.S_t - w.pad_t, h0 = r.q[1] * w.S_h - w.pad_h, w0 = r.q[2] * w.S_w - w.pad_w;
        Sum values[8];
        int inside = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Column& p = first[j];
            int f = f0 + p.t, h = h0 + p.y, x = w0 + p.x;
            if (p.t >= 0 && f >= 0 && f < w.F && h >= 0 && h < w.H && x >= 0 && x < w.W) inside |= 1 << j;
            values[j] = sums[j] * p.factor;
        }
        // Eight pixels of one row: no other octet could end seven pixels after its first.
        bool side_by_side = w.w == 1 && first[7].x == first[0].x + 7 && first[7].y == first[0].y;
        if (inside == 255 && side_by_side)
            return store_eight(a.d_images.data, a.d_images.dtype, r.pixel + first[0].offset, values, 8);
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (inside >> j & 1) store(a.d_images.data, a.d_images.dtype, r.pixel + first[j].offset, values[j]);
    }

    VK_DEVICE void run() {
        int steps = c.all_windows * steps_d;
        int warp = warp_index(), row = warp / SHAPE.warps_n * WM, column = warp % SHAPE.warps_n * WN;
        WarpTile<T, WM, WN> sums;
        sums.clear();
        find();
        sync_block();
        for (int step = 0; step < STAGES - 1; ++step) start(step, steps);
        for (int step = 0; step < steps; ++step) {
            copy_wait<STAGES - 2>();
            sync_block();
            start(step + STAGES - 1, steps);
            auto l = along<T>(left_at(step), LEFT);
            auto r = across<T>(right_at(step), RIGHT);
#pragma unroll
            for (int k = 0; k < BK; k += sums.K_STEP) sums.step(l, row, r, column, k);
        }
        copy_wait<0>();
        sync_block();
        write_tile<WM, WN>(sums, reinterpret_cast<Sum*>(left),
                           [&](int i, int j, const Sum(&octet)[8]) { write(row + i, column + j, octet); });
    }
};

template <class T>
VK_KERNEL(threads_of(images_shape(product_as<T>)), images_shape(product_as<T>).resident)
images_kernel(VK_GRID_CONSTANT ImagesArguments a) {
    int which = 0;
    while (which + 1 < a.count && block_index() >= a.classes[which + 1].first_block) ++which;
    ImagesBlock<T>(a, a.classes[which]).run();
}

template <class T>
void launch_images(const ImagesArguments& a, const ImagesPlan& plan, Stream stream) {
    launch(images_kernel<T>, plan.blocks, threads_of(images_shape(product_as<T>)), plan.shared_bytes, stream, a,
           "the gradient of the images");
}

}  // namespace vk::backward
