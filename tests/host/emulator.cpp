#include "host/emulator.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "host/primitives.h"

#if !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))) || defined(VK_HOST_UCONTEXT)
#include <ucontext.h>
#endif

// Switching between fibers: what a function call must keep, on one stack, and the return address of another.

#if defined(__ELF__) && defined(__x86_64__) && !defined(VK_HOST_UCONTEXT)
extern "C" __attribute__((visibility("hidden"))) void vk_host_switch(void** save, void* resume);
asm(R"(
    .text
    .globl vk_host_switch
    .hidden vk_host_switch
    .type vk_host_switch, @function
vk_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size vk_host_switch, .-vk_host_switch
)");
#elif defined(__ELF__) && defined(__aarch64__) && !defined(VK_HOST_UCONTEXT)
extern "C" __attribute__((visibility("hidden"))) void vk_host_switch(void** save, void* resume);
asm(R"(
    .text
    .globl vk_host_switch
    .hidden vk_host_switch
    .type vk_host_switch, %function
vk_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size vk_host_switch, .-vk_host_switch
)");
#endif

namespace vk::host {

Here here;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr int MOST_THREADS = 1024;
constexpr int MOST_BLOCKS = 4;           // of a cluster
constexpr int MOST_SHARED = 232448;      // of one block on sm_90
constexpr uint32_t FIRST = 1024;         // address of the first byte of shared memory; static data would lie below
constexpr size_t RED = 17 << 10;         // a red zone's size: aligns shared memory to 1024 bytes and to no more
constexpr uint16_t RED_VALUE = 0xfff7;   // a NaN in every format, and not what poison is
constexpr int64_t MOST_BYTES_DUE = (1 << 20) - 1;  // of a barrier (PTX ISA, "Tracking asynchronous operations")

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(VK_HOST_UCONTEXT)
struct Context {
    void* sp;

    void prepare(char* stack, size_t bytes, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + bytes);
#if defined(__x86_64__)
        top[-1] = nullptr;  // where entry would return to
        top[-2] = reinterpret_cast<void*>(entry);
        std::fill(top - 8, top - 2, nullptr);
        sp = top - 8;
#else
        std::fill(top - 20, top, nullptr);
        top[-20 + 11] = reinterpret_cast<void*>(entry);  // x30
        sp = top - 20;
#endif
    }
    void leave_for(Context& other) { vk_host_switch(&sp, other.sp); }
};
#else
struct Context {
    ucontext_t context;

    void prepare(char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void leave_for(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Copy {
    char* to;
    const char* from;
    int bytes, real;
    int group;  // of copy_commit
};

struct Store {
    TensorMap map;
    uint32_t from;
    int at[5];
    int group;  // of stores_commit
    bool early;
};

struct Operation {  // what all lanes of a warp must execute together
    const char* name = "";
    int id = 0, count = 0;

    bool operator==(const Operation& o) const {
        return id == o.id && count == o.count && (name == o.name || std::strcmp(name, o.name) == 0);
    }
    std::string text() const {
        if (std::strcmp(name, "sync_some") == 0)
            return "sync_some(" + std::to_string(id) + ", " + std::to_string(count) + ")";
        if (std::strcmp(name, "warpgroup_wait") == 0) return "warpgroup_wait<" + std::to_string(id) + ">";
        if (std::strcmp(name, "warpgroup_multiply_add") == 0)
            return "warpgroup_multiply_add of N = " + std::to_string(count);
        return name;
    }
};

struct Warp;
struct BarrierState;

struct Thread {
    Context context;
    int index;
    Warp* warp;
    std::vector<Copy> copies;      // that have not landed
    int groups;                    // committed
    bool handed_over;              // whether barriers hold copies of this thread
    std::vector<Store> stores;     // that the copy engine has not made
    int store_groups;              // committed
    std::vector<int64_t> unseen;   // where in shared memory it wrote 4 bytes that the copy engine does not see
    const BarrierState* waits_at;  // a barrier, or null
    uint32_t waits_for;            // its phase's parity
};

// Accumulators of a warp while mmas are under way: 16 rows. The lanes' own registers are NaN meanwhile.
struct Sums {
    float* c[32];
    int columns;
    std::vector<float> values;
};

struct Mma {
    Dtype type;
    int columns;
    bool a_in_shared, across, a_across;
    uint32_t a[32][4];
    const uint32_t* a_registers[32];  // where `a` came from: not to be written before the wait
    uint64_t a_descriptor, b_descriptor;
    std::shared_ptr<Sums> sums;
    int group;  // of warpgroup_commit
};

struct Block;

struct Warp {
    Block* home;
    int index;
    Thread* lanes[32];
    int live;                 // lanes that have not returned
    int place[32];            // of a lane in the order in which this block runs lanes
    Thread* order[32];
    uint32_t ready;           // by place
    uint32_t waiting;         // by lane: those at `operation`
    int arrived;
    Operation operation;
    void* requests[32];
    std::vector<Mma> mmas;    // that are not complete
    int groups;               // of mmas, committed
    bool fenced;              // since the last warpgroup_wait
};

struct Event {  // that will arrive at a barrier: a block of a tensor, or a thread once its copies have landed
    bool of_tensor;
    TensorMap map;
    uint32_t to;
    int at[5];
    Thread* thread;
    std::vector<Copy> copies;
};

struct BarrierState {
    uint32_t address;
    int count, missing;      // arrivals in a phase, and those yet to come in this one
    int64_t due;             // bytes of the copy engine announced and not landed
    uint32_t phase;
    bool known;              // to the copy engine
    std::vector<Thread*> waiters;
    std::deque<Event> events;
};

struct Meeting {  // of warps, at an id of sync, or at warpgroup_wait
    uint32_t warps;
    int threads;
};

struct Block {
    int64_t index;
    Thread threads[MOST_THREADS];
    Warp warps[MOST_THREADS / 32];
    char* stacks;
    alignas(4096) char arena[RED + MOST_SHARED + RED + 4096];
    // Shared memory as the copy engine and wgmma see it ("async proxy"): what threads write reaches it with a fence only.
    alignas(4096) char engine_view[MOST_SHARED];
    Warp* recent;
    uint32_t ready_warps, live_warps;
    Meeting meetings[16], warpgroups[MOST_THREADS / 128];
    std::deque<BarrierState> barriers;
    // Threads' copies that have landed at a barrier and that no fence came after. Any thread's fence will do: it need only
    // be on the way from the copy to the reading (PTX ISA, "Causality order": a proxy fence along the base causality path).
    std::vector<std::pair<int64_t, int64_t>> landed;
    bool early;     // whether its blocks of tensors land at once
    uint32_t slow;  // warps that run where no other can
};

struct Launch {
    void (*call)(const void*, const void*);
    const void* kernel;
    const void* arguments;
    int threads, shared_bytes, cluster;
    uint64_t random;
    Context outside;
    int at_cluster;  // warps, at sync_cluster
    bool apart;      // whether the blocks of a cluster get as far ahead of each other as they can
    void* early;     // what the launch before this one makes, and what it will be
    std::string to_come;
    bool awaited;    // it is there
    std::string error;
    bool failed;
};

Launch launched;
Block blocks[MOST_BLOCKS];  // of the cluster that runs, `launched.cluster` of them
Block* block = blocks;      // whose thread runs, or that it reaches into
Thread* current;

char* shared() { return block->arena + RED; }

// What a thread does in another block of its cluster
class In {
public:
    In(int rank, const char* what) : before(block) {
        if (rank < 0 || rank >= launched.cluster)
            fail(std::string(what) + ": block " + std::to_string(rank) + " of a cluster of " + std::to_string(launched.cluster));
        block = blocks + rank;
        if (block->live_warps) return;
        block = before;
        fail(std::string(what) + ": block " + std::to_string(rank) + " of the cluster has ended");
    }
    ~In() { block = before; }

private:
    Block* before;
};

uint64_t draw() {  // xorshift64*
    uint64_t& x = launched.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 0x2545f4914f6cdd1dull;
}

std::string in_shared(int64_t offset) { return "shared memory + " + std::to_string(offset); }

// Where in shared memory `bytes` at p lie; an error where they don't.
int64_t offset_of(const void* p, int64_t bytes, const char* what) {
    int64_t offset = static_cast<const char*>(p) - shared();
    if (offset < -static_cast<int64_t>(sizeof block->arena) || offset > static_cast<int64_t>(sizeof block->arena))
        fail(std::string(what) + ": the address is not in shared memory");
    if (offset < 0 || offset + bytes > launched.shared_bytes)
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + in_shared(offset) +
             " are not within the " + std::to_string(launched.shared_bytes) + " that the launch asked for");
    return offset;
}

void poison(int64_t offset, int64_t bytes) {
    std::memset(shared() + offset, 0xff, static_cast<size_t>(bytes));
    std::memset(block->engine_view + offset, 0xff, static_cast<size_t>(bytes));
}

// Running

void make_ready(Thread& t) {
    Warp& w = *t.warp;
    w.ready |= 1u << w.place[t.index % 32];
    w.home->ready_warps |= 1u << w.index;
}

// Goes on to another block of the cluster where this one has no thread that can run; in half of them also where it has.
bool pick_block() {
    bool stay = launched.cluster == 1 || (block->ready_warps && (launched.apart || draw() % 16));
    if (stay) return block->ready_warps;
    for (uint64_t i = 0, first = draw(); i < uint64_t(launched.cluster); ++i)
        if (Block& other = blocks[(first + i) % uint64_t(launched.cluster)]; other.ready_warps) {
            block = &other;
            return true;
        }
    return false;
}

Thread* pick() {
    if (!pick_block()) return nullptr;
    Warp* w = block->recent;
    uint32_t fast = block->ready_warps & ~block->slow, left = fast ? fast : block->ready_warps;
    // Mostly one warp runs on for as long as it can, the farther ahead of the others.
    if (w == nullptr || !(left >> w->index & 1) || draw() % 8 == 0) {
        for (uint64_t skip = draw() % __builtin_popcount(left); skip; --skip) left &= left - 1;
        w = &block->warps[__builtin_ctz(left)];
    }
    block->recent = w;
    int place = __builtin_ctz(w->ready);
    w->ready &= w->ready - 1;
    if (!w->ready) block->ready_warps &= ~(1u << w->index);
    return w->order[place];
}

void become(Thread* t) {  // or nobody
    current = t;
    if (t == nullptr) return;
    block = t->warp->home;
    here.thread = t->index, here.block = block->index, here.shared = shared();
}

// Runs others until somebody has made this thread ready.
void wait() {
    Thread* from = current;
    Thread* next = pick();
    if (next == from) return;
    become(next);
    from->context.leave_for(next ? next->context : launched.outside);
}

// Meeting

void release(Warp& w) {
    for (uint32_t lanes = w.waiting; lanes; lanes &= lanes - 1) {
        Thread* t = w.lanes[__builtin_ctz(lanes)];
        if (t != current) make_ready(*t);
    }
    w.waiting = 0;
    w.arrived = 0;
}

void release(Meeting& meeting) {
    uint32_t met = meeting.warps;
    meeting.warps = 0;
    for (; met; met &= met - 1) release(block->warps[__builtin_ctz(met)]);
}

void arrive_in_warp(const Operation& operation, void* request) {
    Thread& t = *current;
    Warp& w = *t.warp;
    int lane = t.index % 32;
    if (w.arrived == 0)
        w.operation = operation;
    else if (!(w.operation == operation))
        fail("lanes of a warp diverge: this one is at " + operation.text() + ", thread " +
             std::to_string(w.index * 32 + __builtin_ctz(w.waiting)) + " at " + w.operation.text());
    w.waiting |= 1u << lane;
    w.requests[lane] = request;
    ++w.arrived;
}

// All 32 lanes meet; the last does the work for all.
template <class Work>
void meet(const Operation& operation, void* request, Work work) {
    Warp& w = *current->warp;
    if (w.live < 32)
        fail(operation.text() + ": all lanes of the warp must meet, but only " + std::to_string(w.live) +
             " of 32 are there or have not returned");
    arrive_in_warp(operation, request);
    if (w.arrived < 32) {
        wait();
        return;
    }
    work(w);
    release(w);
}

bool of_block(const Operation& operation) {
    return std::strncmp(operation.name, "sync_", 5) == 0 && std::strcmp(operation.name, "sync_warp") != 0;
}

void release_cluster() {  // where all warps of its blocks that have not ended are there
    int live = 0;
    for (int i = 0; i < launched.cluster; ++i) live += __builtin_popcount(blocks[i].live_warps);
    if (launched.at_cluster == 0 || launched.at_cluster < live) return;
    launched.at_cluster = 0;
    for (int i = 0; i < launched.cluster; ++i)
        for (Warp& w : blocks[i].warps)
            if (blocks[i].live_warps >> w.index & 1) release(w);
}

void arrive_at_sync(Warp& w) {  // with all lanes
    if (std::strcmp(w.operation.name, "sync_cluster") == 0) {
        ++launched.at_cluster;
        return release_cluster();
    }
    Meeting& m = block->meetings[w.operation.id];
    if (m.warps && m.threads != w.operation.count)
        fail(w.operation.text() + ": others wait there for " + std::to_string(m.threads) + " threads");
    m.threads = w.operation.count;
    m.warps |= 1u << w.index;
    if (w.operation.id == 0 ? m.warps == block->live_warps : __builtin_popcount(m.warps) * 32 == m.threads) release(m);
}

// Copies

void land(const Copy& c) {
    std::memcpy(c.to, c.from, static_cast<size_t>(c.real));
    std::memset(c.to + c.real, 0, static_cast<size_t>(c.bytes - c.real));
}

uint32_t swizzled(uint32_t address, int span) {  // span 0, 32, 64, 128: 16-byte piece ^= 128-byte line, modulo the span
    uint32_t mask = span ? static_cast<uint32_t>(span / 16 - 1) : 0;
    return address ^ (address >> 7 & mask) << 4;
}

int64_t bytes_of(const TensorMap& map) {
    int64_t bytes = size_of(map.dtype);
    for (uint32_t n : map.block) bytes *= n;
    return bytes;
}

// act(address of a row of the block in shared memory, where the tensor has it, bytes of the row before what is the
// tensor's, bytes of that), row by row; the last is 0, and there is no where, for a row outside of the tensor.
template <class Act>
void for_each_row(const TensorMap& map, uint32_t shared_row, const int (&at)[5], Act act) {
    int64_t size = size_of(map.dtype);
    auto inside = [&](int64_t i, int dimension) { return i >= 0 && i < static_cast<int64_t>(map.sizes[dimension]); };
    int64_t first = std::max<int64_t>(at[0], 0);
    int64_t end = std::min<int64_t>(at[0] + int64_t{map.block[0]}, static_cast<int64_t>(map.sizes[0]));
    int64_t i[5];
    for (i[4] = at[4]; i[4] < at[4] + int64_t{map.block[4]}; ++i[4])
        for (i[3] = at[3]; i[3] < at[3] + int64_t{map.block[3]}; ++i[3])
            for (i[2] = at[2]; i[2] < at[2] + int64_t{map.block[2]}; ++i[2])
                for (i[1] = at[1]; i[1] < at[1] + int64_t{map.block[1]}; ++i[1]) {
                    const char* where = nullptr;
                    if (first < end && inside(i[1], 1) && inside(i[2], 2) && inside(i[3], 3) && inside(i[4], 4)) {
                        where = map.base + first * size;
                        for (int d = 1; d < 5; ++d) where += i[d] * static_cast<int64_t>(map.strides[d]);
                    }
                    act(shared_row, where, (first - at[0]) * size, where ? (end - first) * size : 0);
                    shared_row += static_cast<uint32_t>(map.block[0] * size);
                }
}

void land_tensor(const Event& e) {
    int64_t row_bytes = e.map.block[0] * int64_t{size_of(e.map.dtype)};
    for_each_row(e.map, e.to, e.at, [&](uint32_t to, const char* from, int64_t before, int64_t bytes) {
        char row[256 * 8];
        std::memset(row, 0, static_cast<size_t>(row_bytes));
        if (from) std::memcpy(row + before, from, static_cast<size_t>(bytes));
        for (int64_t piece = 0; piece < row_bytes; piece += 16) {
            uint32_t offset = swizzled(to + static_cast<uint32_t>(piece), e.map.swizzle) - FIRST;
            std::memcpy(shared() + offset, row + piece, 16);
            std::memcpy(block->engine_view + offset, row + piece, 16);
        }
    });
}

void make(const Store& s) {
    int64_t row_bytes = s.map.block[0] * int64_t{size_of(s.map.dtype)};
    for_each_row(s.map, s.from, s.at, [&](uint32_t from, const char* to, int64_t before, int64_t bytes) {
        if (to == nullptr) return;
        char row[256 * 8];
        for (int64_t piece = 0; piece < row_bytes; piece += 16)
            std::memcpy(row + piece, block->engine_view + swizzled(from + static_cast<uint32_t>(piece), s.map.swizzle) - FIRST, 16);
        std::memcpy(const_cast<char*>(to), row + before, static_cast<size_t>(bytes));
    });
}

// Barriers. The word in shared memory holds the index of the state, so that one overwritten or never initialised shows.

constexpr uint64_t BARRIER_WORD = 0xbaff1e0000000000;

std::string text(const BarrierState& b) {
    return "the barrier at " + in_shared(b.address - FIRST) + " (phase " + std::to_string(b.phase) + ": " +
           std::to_string(b.missing) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.due) +
           " bytes to come)";
}

BarrierState& state(const Barrier* barrier, const char* what) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8) fail(std::string(what) + ": a barrier is aligned to 8 bytes");
    int64_t offset = offset_of(barrier, 8, what);
    uint64_t index = *barrier ^ BARRIER_WORD;
    if (index >= block->barriers.size() || block->barriers[index].address != offset + FIRST)
        fail(std::string(what) + ": the barrier at " + in_shared(offset) + " was not initialised, or is overwritten");
    return block->barriers[index];
}

void end_phase_if_complete(BarrierState& b) {
    if (b.missing || b.due) return;
    ++b.phase;
    b.missing = b.count;
    for (Thread* t : b.waiters) make_ready(*t);
    b.waiters.clear();
}

void arrive(BarrierState& b, const char* what) {
    if (b.missing == 0) fail(std::string(what) + ": one arrival too many at " + text(b));
    --b.missing;
    end_phase_if_complete(b);
}

void land(BarrierState& b, const Event& e) {
    for (const Copy& c : e.copies) {
        land(c);
        block->landed.emplace_back(c.to - shared(), c.bytes);
    }
    if (e.of_tensor) {
        land_tensor(e);
        b.due -= bytes_of(e.map);
        end_phase_if_complete(b);
    } else {
        arrive(b, "barrier_arrive_after_copies");
    }
}

// When all threads wait: copies land, of one barrier at which somebody waits. False where there are none.
bool land_what_is_waited_for() {
    std::vector<std::pair<Block*, BarrierState*>> waited;
    for (int i = 0; i < launched.cluster; ++i)
        for (BarrierState& b : blocks[i].barriers)
            if (!b.waiters.empty() && !b.events.empty()) waited.emplace_back(&blocks[i], &b);
    if (waited.empty()) return false;
    auto& [home, of_home] = waited[draw() % waited.size()];
    block = home;
    BarrierState& b = *of_home;
    for (uint32_t phase = b.phase; phase == b.phase && !b.events.empty();) {
        Event e = std::move(b.events.front());
        b.events.pop_front();
        land(b, e);
    }
    return true;
}

// Matrices

int depth_of(Dtype type) { return type == Dtype::f32 ? 8 : 16; }  // of k in one step of the tensor cores, 32 bytes

// As tensor cores round their sums, towards zero (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores")
float cut_off(double exact) {
    float near = static_cast<float>(exact);
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    bits -= std::fabs(static_cast<double>(near)) > std::fabs(exact);  // the next towards zero
    std::memcpy(&near, &bits, 4);
    return near;
}

float tf32_of(uint32_t bits) { return float_of(bits & ~0x1fffu); }  // the tensor core doesn't look at the other bits

void multiply_warp(Warp& w, Dtype type) {
    struct Request {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    };
    bool tf32 = type == Dtype::f32;
    int depth = depth_of(type);
    float a[16][16], b[16][8];
    auto number = [&](uint32_t bits) {
        return type == Dtype::f16 ? half_to_float(static_cast<uint16_t>(bits))
                                  : bfloat16_to_float(static_cast<uint16_t>(bits));
    };
    for (int lane = 0; lane < 32; ++lane) {
        const Request& r = *static_cast<Request*>(w.requests[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            int row = g + i % 2 * 8;
            if (tf32) {
                a[row][t + i / 2 * 4] = tf32_of(r.a[i]);
            } else {
                a[row][2 * t + i / 2 * 8] = number(r.a[i]);
                a[row][2 * t + i / 2 * 8 + 1] = number(r.a[i] >> 16);
            }
        }
        for (int i = 0; i < 2; ++i) {
            if (tf32) {
                b[t + i * 4][g] = tf32_of(r.b[i]);
            } else {
                b[2 * t + i * 8][g] = number(r.b[i]);
                b[2 * t + i * 8 + 1][g] = number(r.b[i] >> 16);
            }
        }
    }
    float sums[16][8] = {};
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < depth; ++k)
            for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane) {
        float* c = static_cast<Request*>(w.requests[lane])->c;
        for (int i = 0; i < 4; ++i) c[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

// 32 bytes along k of `rows` rows from `first`, as numbers, k outermost: out[k·rows + row].
void read_operand(uint64_t descriptor, Dtype type, bool across, int first, int rows, float* out, const char* which) {
    auto refuse = [&](const std::string& why) {
        fail(std::string("warpgroup_multiply_add: operand ") + which + ": " + why);
    };
    static const int SPANS[4] = {0, 128, 64, 32};
    int span = SPANS[descriptor >> 62];
    if (span == 0) refuse("a descriptor without a swizzle, which this emulator does not know");
    uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    uint32_t next8 = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) refuse("a base offset, which this emulator does not know");
    auto piece_at = [&](uint32_t address, const char* what, int index, uint16_t (&bits)[8]) {
        int64_t offset = static_cast<int64_t>(swizzled(address, span)) - FIRST;
        if (offset < 0 || offset + 16 > launched.shared_bytes)
            refuse(what + (" " + std::to_string(index)) + " at " + in_shared(offset) + " is not within the " +
                   std::to_string(launched.shared_bytes) + " bytes that the launch asked for");
        std::memcpy(bits, block->engine_view + offset, 16);
    };
    auto number = [&](uint16_t bits) { return type == Dtype::f16 ? half_to_float(bits) : bfloat16_to_float(bits); };
    if (across && type == Dtype::f32) refuse("TF32 with its rows innermost, which wgmma does not take");
    if (across) {
        // Lines of span / 2 rows, eight lines along k a pattern of the swizzle: start and both offsets are multiples.
        uint32_t next_rows = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4, pattern = 8 * span;
        if (start % pattern || next_rows % pattern || next8 % pattern)
            refuse("address " + std::to_string(start) + " and offsets " + std::to_string(next_rows) + ", " +
                   std::to_string(next8) + " are not multiples of " + std::to_string(pattern));
        for (int k = 0; k < 16; ++k)
            for (int row = first; row < first + rows; row += 8) {
                uint32_t line = start + static_cast<uint32_t>(row * 2 / span) * next_rows + k / 8 * next8;
                uint16_t bits[8];
                piece_at(line + static_cast<uint32_t>(k % 8 * span + row * 2 % span), "k =", k, bits);
                for (int i = 0; i < 8; ++i) out[k * rows + row - first + i] = number(bits[i]);
            }
        return;
    }
    // Eight rows are where the swizzle's pattern starts over, and the address inside of them is that of k.
    if (start % (8 * span) + 32 > static_cast<uint32_t>(span))
        refuse("32 bytes at address " + std::to_string(start) + " are not within the first of 8 rows of " +
               std::to_string(span) + " bytes");
    for (int row = first; row < first + rows; ++row) {
        for (int piece = 0; piece < 2; ++piece) {
            uint32_t address = start + row / 8 * next8 + static_cast<uint32_t>(row % 8 * span + piece * 16);
            uint16_t bits[8];
            piece_at(address, "row", row, bits);
            if (type == Dtype::f32) {
                float* to = out + piece * 4 * rows + (row - first);
                for (int k = 0; k < 4; ++k)
                    to[k * rows] = tf32_of(bits[2 * k] | static_cast<uint32_t>(bits[2 * k + 1]) << 16);
            } else {
                float* to = out + piece * 8 * rows + (row - first);
                for (int k = 0; k < 8; ++k) to[k * rows] = number(bits[k]);
            }
        }
    }
}

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_ANY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))  // as the CPU that runs it has
#else
#define FOR_ANY_WIDTH
#endif

// sums[n] += a row of A, a[16·k], times B, b[k·columns + n]: products of halves are exact in float, of TF32 in double.
FOR_ANY_WIDTH void multiply_row(const float* a, const float* b, int columns, float* __restrict__ sums) {
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < columns; ++n) sums[n] += a[16 * k] * b[k * columns + n];
}

FOR_ANY_WIDTH void multiply_row_of_tf32(const float* a, const float* b, int columns, float* __restrict__ sums) {
    double exact[256];
    for (int n = 0; n < columns; ++n) exact[n] = double{sums[n]};
    for (int k = 0; k < 8; ++k)
        for (int n = 0; n < columns; ++n) exact[n] += double{a[16 * k]} * double{b[k * columns + n]};
    for (int n = 0; n < columns; ++n) sums[n] = cut_off(exact[n]);
}

float* of_lane(Sums& s, int lane, int i) {  // sum i of a lane
    return &s.values[static_cast<size_t>((lane / 4 + i / 2 % 2 * 8) * s.columns + i / 4 * 8 + lane % 4 * 2 + i % 2)];
}

void multiply_warpgroup(int first_warp, size_t index) {  // the warps' mma `index`
    static float b[16 * 256];
    const Mma& one = block->warps[first_warp].mmas[index];
    read_operand(one.b_descriptor, one.type, one.across, 0, one.columns, b, "B");
    for (int i = 0; i < 4; ++i) {
        Mma& mma = block->warps[first_warp + i].mmas[index];
        for (int lane = 0; lane < 32 && !mma.a_in_shared; ++lane)
            if (!std::equal(mma.a[lane], mma.a[lane] + 4, mma.a_registers[lane]))
                fail("warpgroup_multiply_add: registers of operand A were written before the warpgroup_wait, by lane " +
                     std::to_string(lane) + " of warp " + std::to_string(first_warp + i));
        float a[16 * 16];  // [k][row]
        if (mma.a_in_shared) {
            read_operand(mma.a_descriptor, mma.type, mma.a_across, 16 * i, 16, a, "A");
        } else {
            for (int lane = 0; lane < 32; ++lane)
                for (int r = 0; r < 4; ++r) {
                    if (mma.type == Dtype::f32) {
                        a[(lane % 4 + r / 2 * 4) * 16 + lane / 4 + r % 2 * 8] = tf32_of(mma.a[lane][r]);
                        continue;
                    }
                    for (int high = 0; high < 2; ++high) {
                        uint16_t bits = static_cast<uint16_t>(mma.a[lane][r] >> 16 * high);
                        a[(lane % 4 * 2 + r / 2 * 8 + high) * 16 + lane / 4 + r % 2 * 8] =
                            mma.type == Dtype::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
                    }
                }
        }
        auto multiply = one.type == Dtype::f32 ? multiply_row_of_tf32 : multiply_row;
        for (int row = 0; row < 16; ++row)
            multiply(a + row, b, mma.columns, &mma.sums->values[static_cast<size_t>(row * mma.columns)]);
    }
}

void finish_mmas(int first_warp, int pending) {  // of a warpgroup, but for the `pending` latest groups
    Warp& one = block->warps[first_warp];
    size_t done = 0;
    while (done < one.mmas.size() && one.mmas[done].group < one.groups - pending) ++done;
    for (int i = 1; i < 4; ++i) {
        Warp& w = block->warps[first_warp + i];
        bool same = w.groups == one.groups && w.mmas.size() == one.mmas.size();
        for (size_t m = 0; same && m < w.mmas.size(); ++m) {
            const Mma &x = one.mmas[m], &y = w.mmas[m];
            same = x.type == y.type && x.columns == y.columns && x.a_in_shared == y.a_in_shared &&
                   x.across == y.across && x.a_across == y.a_across && x.group == y.group && x.a_descriptor == y.a_descriptor &&
                   x.b_descriptor == y.b_descriptor;
        }
        if (!same)
            fail("warps " + std::to_string(first_warp) + " and " + std::to_string(w.index) +
                 " of a warpgroup have not issued the same mmas with the same descriptors");
    }
    for (size_t m = 0; m < done; ++m) multiply_warpgroup(first_warp, m);
    for (int i = 0; i < 4; ++i) {
        Warp& w = block->warps[first_warp + i];
        for (size_t m = 0; m < done; ++m) {
            std::shared_ptr<Sums> sums = std::move(w.mmas[m].sums);
            if (sums.use_count() > 1) continue;  // later mmas add to them
            for (int lane = 0; lane < 32; ++lane)
                for (int k = 0; k < sums->columns / 2; ++k) sums->c[lane][k] = *of_lane(*sums, lane, k);
        }
        w.mmas.erase(w.mmas.begin(), w.mmas.begin() + static_cast<std::ptrdiff_t>(done));
        w.fenced = false;
    }
}

// A block's life

void leave() {  // a thread has returned
    Thread& t = *current;
    Warp& w = *t.warp;
    if (!t.copies.empty())
        fail("copies never waited for: " + std::to_string(t.copies.size()) + ", the first to " +
             in_shared(t.copies[0].to - shared()));
    if (!t.stores.empty())
        fail("stores of the copy engine never waited for: " + std::to_string(t.stores.size()) + ", the first from " +
             in_shared(t.stores[0].from - FIRST));
    --w.live;
    if (w.live == 0) {
        if (!w.mmas.empty())
            fail("mmas of the warpgroup never waited for: " + std::to_string(w.mmas.size()) + " of warp " +
                 std::to_string(w.index));
        block->live_warps &= ~(1u << w.index);
        release_cluster();
        Meeting& all = block->meetings[0];
        if (all.warps && all.warps == block->live_warps) release(all);
    } else if (w.arrived) {
        if (!of_block(w.operation))
            fail("lanes of a warp diverge: this one has returned, thread " +
                 std::to_string(w.index * 32 + __builtin_ctz(w.waiting)) + " is at " + w.operation.text());
        if (w.arrived == w.live) arrive_at_sync(w);
    }
}

std::string of_block_and_thread() {
    std::string text = "block " + std::to_string(here.block);
    return current ? text + ", thread " + std::to_string(here.thread) : text;
}

void entry() {
    try {
        launched.call(launched.kernel, launched.arguments);
        leave();
    } catch (const std::exception& e) {
        launched.error = e.what();
        launched.failed = true;
    } catch (...) {
        launched.error = of_block_and_thread() + ": an exception of an unknown kind";
        launched.failed = true;
    }
    Thread& t = *current;
    Thread* next = launched.failed ? nullptr : pick();
    become(next);
    t.context.leave_for(next ? next->context : launched.outside);
    std::abort();  // nobody resumes a thread that has returned
}

std::string who_waits() {  // of a block
    std::string all;
    int listed = 0;
    auto place_of = [](const Thread& t) {
        if (t.waits_at)
            return "barrier_wait, parity " + std::to_string(t.waits_for) + ", of " + text(*t.waits_at);
        return t.warp->operation.text();
    };
    auto waits = [](const Thread& t) { return t.waits_at || (t.warp->waiting >> t.index % 32 & 1); };
    for (int i = 0; i < launched.threads;) {
        int first = i;
        if (!waits(block->threads[static_cast<size_t>(i)])) {
            ++i;
            continue;
        }
        std::string place = place_of(block->threads[static_cast<size_t>(first)]);
        while (i < launched.threads && waits(block->threads[static_cast<size_t>(i)]) &&
               place_of(block->threads[static_cast<size_t>(i)]) == place)
            ++i;
        if (++listed > 12) return all + "; …";
        all += (all.empty() ? "" : "; ") + std::string(i - first > 1 ? "threads " : "thread ") + std::to_string(first) +
               (i - first > 1 ? " … " + std::to_string(i - 1) : "") + " at " + place;
    }
    return all;
}

void check_red_zone(const char* zone, size_t bytes, const char* end_name, int64_t from) {
    if (std::memcmp(zone, &RED_VALUE, 2) == 0 && std::memcmp(zone, zone + 2, bytes - 2) == 0) return;  // each is the next
    for (size_t i = 0; i < bytes; i += 2)
        if (std::memcmp(zone + i, &RED_VALUE, 2) != 0)
            fail(std::string("written ") + end_name + " shared memory: at " +
                 in_shared(from + static_cast<int64_t>(i)) + " of " + std::to_string(launched.shared_bytes) + " bytes");
}

void fill_red_zone(char* zone, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 2) std::memcpy(zone + i, &RED_VALUE, 2);
}

void make_stacks() {
    if (block->stacks) return;
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    block->stacks = static_cast<char*>(memory);
    for (int i = 0; i < MOST_THREADS; ++i) mprotect(block->stacks + STACK * static_cast<size_t>(i), page, PROT_NONE);
}

void seed_with(uint64_t seed, int64_t first_block) {
    launched.random = (seed * 0x9e3779b97f4a7c15ull ^ static_cast<uint64_t>(first_block + 1) * 0xbf58476d1ce4e5b9ull) | 1;
    for (int i = 0; i < 4; ++i) draw();
}

void start_block(int64_t index) {
    block->index = index;
    block->early = draw() % 2 == 0;
    block->slow = block->early ? static_cast<uint32_t>(draw() >> 32) : 0;  // else they would hold up all that lands
    block->recent = nullptr;
    block->ready_warps = block->live_warps = 0;
    for (Meeting& m : block->meetings) m = {};
    for (Meeting& m : block->warpgroups) m = {};
    block->barriers.clear();
    block->landed.clear();
    poison(0, launched.shared_bytes);
    for (int i = 0; i < (launched.threads + 31) / 32; ++i) {
        Warp& w = block->warps[i];
        w.home = block;
        w.index = i;
        w.live = std::min(32, launched.threads - 32 * i);
        w.ready = w.waiting = 0;
        w.arrived = 0;
        w.mmas.clear();
        w.groups = 0;
        w.fenced = false;
        int order[32];
        for (int lane = 0; lane < w.live; ++lane) {
            int other = static_cast<int>(draw() % static_cast<uint64_t>(lane + 1));
            order[lane] = order[other];
            order[other] = lane;
        }
        for (int place = 0; place < w.live; ++place) {
            Thread& t = block->threads[static_cast<size_t>(32 * i + order[place])];
            w.place[order[place]] = place;
            w.order[place] = w.lanes[order[place]] = &t;
            t.index = 32 * i + order[place];
            t.warp = &w;
            t.copies.clear();
            t.groups = 0;
            t.handed_over = false;
            t.stores.clear();
            t.store_groups = 0;
            t.unseen.clear();
            t.waits_at = nullptr;
            // Stacks start at different places of a page, or all of them would fall on the same lines of the cache.
            size_t shift = static_cast<size_t>(t.index * 37 % 128) * 128;
            t.context.prepare(block->stacks + STACK * static_cast<size_t>(t.index), STACK - shift, entry);
            make_ready(t);
        }
        block->live_warps |= 1u << i;
    }
}

void check_ended() {  // a block
    for (const BarrierState& b : block->barriers)
        for (const Event& e : b.events)
            if (e.of_tensor || !e.copies.empty()) fail("copies never waited for: some that count at " + text(b));
    check_red_zone(block->arena, RED, "in front of", -static_cast<int64_t>(RED));
    check_red_zone(shared() + launched.shared_bytes, RED, "behind", launched.shared_bytes);
}

template <class Act>
void for_each_block(Act act) {  // of the cluster
    for (int i = 0; i < launched.cluster; ++i) {
        block = blocks + i;
        here.block = block->index;
        act();
    }
}

void run_cluster() {
    for (;;) {
        while (Thread* t = pick()) {
            become(t);
            launched.outside.leave_for(t->context);
            become(nullptr);
            if (launched.failed) throw std::runtime_error(launched.error);
        }
        bool ended = true;
        for_each_block([&] { ended = ended && !block->live_warps; });
        if (ended) break;
        if (land_what_is_waited_for()) continue;
        std::string who;
        for_each_block([&] {
            if (std::string waiting = who_waits(); !waiting.empty())
                who += (who.empty() ? "" : "; block " + std::to_string(block->index) + ": ") + waiting;
        });
        block = blocks, here.block = block->index;
        fail("deadlock: " + who);
    }
    for_each_block(check_ended);
}

}  // namespace

void fail(const std::string& message) { throw std::runtime_error(of_block_and_thread() + ": " + message); }

uint32_t shared_address(const void* p) { return static_cast<uint32_t>(offset_of(p, 0, "shared_address")) + FIRST; }

void wait_for_prerequisites() {
    if (!launched.awaited) std::memcpy(launched.early, launched.to_come.data(), launched.to_come.size());
    launched.awaited = true;
}

static void sync(const Operation& operation) {
    Thread& t = *current;
    Warp& w = *t.warp;
    arrive_in_warp(operation, nullptr);
    if (w.arrived == w.live) arrive_at_sync(w);
    if (w.waiting >> t.index % 32 & 1) wait();
}

void sync(int id, int threads) {
    if (id && (threads < 32 || threads % 32 || threads > launched.threads))
        fail("sync_some: " + std::to_string(threads) + " threads of " + std::to_string(launched.threads));
    sync({id ? "sync_some" : "sync_block", id, threads});
}

void sync_cluster() { sync({"sync_cluster", 0, 0}); }

void sync_warp(const char* name) {
    meet({name, 0, 0}, nullptr, [](Warp&) {});
}

uint64_t shuffle(uint64_t value, int lane) {
    struct Request {
        uint64_t value;
        int lane;
        uint64_t result;
    } request{value, lane, 0};
    meet({"shuffle", 0, 0}, &request, [](Warp& w) {
        for (void* r : w.requests) {
            Request& to = *static_cast<Request*>(r);
            to.result = static_cast<Request*>(w.requests[to.lane & 31])->value;
        }
    });
    return request.result;
}

void copy_async(void* to, const void* from, int bytes, int real) {
    Thread& t = *current;
    int64_t offset = offset_of(to, bytes, "copy_async");
    if (offset % bytes || reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes))
        fail("copy_async of " + std::to_string(bytes) + " bytes to " + in_shared(offset) + " from an address " +
             std::to_string(reinterpret_cast<uintptr_t>(from) % 16) + " past a multiple of 16: misaligned");
    if (real < 0 || real > bytes)
        fail("copy_async: " + std::to_string(real) + " bytes of " + std::to_string(bytes) + " are real");
    poison(offset, bytes);
    t.copies.push_back({shared() + offset, static_cast<const char*>(from), bytes, real, t.groups});
}

void copy_commit() { ++current->groups; }

void copy_wait(int pending) {
    Thread& t = *current;
    int complete = t.groups - pending;
    auto land_complete = [&](std::vector<Copy>& copies) {
        size_t left = 0;
        for (const Copy& c : copies) {
            if (c.group < complete)
                land(c);
            else
                copies[left++] = c;
        }
        copies.resize(left);
    };
    land_complete(t.copies);
    if (t.handed_over)
        for (BarrierState& b : block->barriers)
            for (Event& e : b.events)
                if (!e.of_tensor && e.thread == &t) land_complete(e.copies);
}

void load_matrices(uint32_t* r, const void* row, bool transposed) {
    struct Request {
        uint32_t* r;
        const void* row;
    } request{r, row};
    if (offset_of(row, 16, "load_matrices") % 16) fail("load_matrices: a row that is not aligned to 16 bytes");
    meet({transposed ? "load_matrices_transposed" : "load_matrices", 0, 0}, &request, [transposed](Warp& w) {
        uint16_t values[32][8];
        for (int lane = 0; lane < 32; ++lane)
            std::memcpy(values[lane], static_cast<Request*>(w.requests[lane])->row, 16);
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                int g = lane / 4, t = lane % 4;
                uint32_t low = transposed ? values[8 * i + 2 * t][g] : values[8 * i + g][2 * t];
                uint32_t high = transposed ? values[8 * i + 2 * t + 1][g] : values[8 * i + g][2 * t + 1];
                static_cast<Request*>(w.requests[lane])->r[i] = low | high << 16;
            }
    });
}

void multiply_add(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Dtype type) {
    struct {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } request{c, a, {b0, b1}};
    const char* name = type == Dtype::f16 ? "multiply_add<half>" : type == Dtype::bf16 ? "multiply_add<bfloat16>"
                                                                                       : "multiply_add<float>";
    meet({name, 0, 0}, &request, [type](Warp& w) { multiply_warp(w, type); });
}

void barrier_init(Barrier* barrier, int count) {
    int64_t offset = offset_of(barrier, 8, "barrier_init");
    if (offset % 8) fail("barrier_init: a barrier is aligned to 8 bytes");
    if (count < 1 || count >= 1 << 20) fail("barrier_init: a count of " + std::to_string(count));
    for (const BarrierState& b : block->barriers)
        if (b.address == offset + FIRST) fail("barrier_init: initialised a second time: " + text(b));
    *barrier = BARRIER_WORD ^ block->barriers.size();
    BarrierState b{};
    b.address = static_cast<uint32_t>(offset) + FIRST;
    b.count = b.missing = count;
    block->barriers.push_back(b);
}

void barrier_init_done() {
    for (BarrierState& b : block->barriers) b.known = true;
    std::memcpy(block->engine_view, shared(), static_cast<size_t>(launched.shared_bytes));  // it is a fence between proxies, too
}

void barrier_arrive(Barrier* barrier) { arrive(state(barrier, "barrier_arrive"), "barrier_arrive"); }

// What lies in the block's own shared memory where `p` does in that of the thread's
template <class T>
static T* there(T* p) { return reinterpret_cast<T*>(shared() + (reinterpret_cast<const char*>(p) - here.shared)); }

void read_words_of(int rank, const void* p, uint32_t* words) {
    if (offset_of(p, 16, "read_words_of") % 16) fail("read_words_of an address that is not aligned to 16 bytes");
    In other(rank, "read_words_of");
    std::memcpy(words, there(p), 16);
}

void barrier_arrive(Barrier* barrier, int rank) {
    In other(rank, "barrier_arrive");
    barrier_arrive(there(barrier));
}

void barrier_expect(Barrier* barrier, int bytes) {
    BarrierState& b = state(barrier, "barrier_expect");
    if (bytes < 0 || b.due + bytes > MOST_BYTES_DUE)
        fail("barrier_expect of " + std::to_string(bytes) + " bytes, at most 2^20 − 1 of a phase: " + text(b));
    b.due += bytes;
    arrive(b, "barrier_expect");
}

void barrier_arrive_after_copies(Barrier* barrier) {
    Thread& t = *current;
    BarrierState& b = state(barrier, "barrier_arrive_after_copies");
    if (t.copies.empty()) return arrive(b, "barrier_arrive_after_copies");
    Event e{};
    e.thread = &t;
    e.copies.swap(t.copies);
    t.handed_over = true;
    b.events.push_back(std::move(e));
}

void barrier_wait(const Barrier* barrier, uint32_t phase) {
    Thread& t = *current;
    if (phase > 1) fail("barrier_wait: a parity of " + std::to_string(phase));
    BarrierState& b = state(barrier, "barrier_wait");
    while ((b.phase & 1) == phase) {
        b.waiters.push_back(&t);
        t.waits_at = &b;
        t.waits_for = phase;
        wait();
        t.waits_at = nullptr;
    }
}

void check_map(const TensorMap* map, int rank, const char* what) {
    if (reinterpret_cast<uintptr_t>(map) % 64) fail("a tensor map is aligned to 64 bytes");
    if (map->rank < 1 || map->rank > 5 || map->base == nullptr) fail("a tensor map that make_tensor_map did not make");
    if (rank && map->rank != rank)
        fail(std::string(what) + " with " + std::to_string(rank) + " coordinates, and a map of " +
             std::to_string(map->rank));
}

// The address of a block in shared memory
static uint32_t block_at(const void* p, const TensorMap* map, int rank, const char* what) {
    check_map(map, rank, what);
    int64_t offset = offset_of(p, bytes_of(*map), what);
    // The pattern of the swizzle is one of absolute addresses: a block starts where the pattern does.
    int64_t alignment = std::max(128, 8 * map->swizzle);
    if ((offset + FIRST) % alignment)
        fail(std::string(what) + " at " + in_shared(offset) + ": not aligned to " + std::to_string(alignment) +
             " bytes");
    if (map->swizzle && map->block[0] * static_cast<int64_t>(size_of(map->dtype)) != map->swizzle)
        fail(std::string(what) + ": a block narrower than its swizzle, the layout of which this emulator does not know");
    return static_cast<uint32_t>(offset) + FIRST;
}

void copy_tensor_to_all(void* to, const TensorMap* map, Barrier* barrier, int blocks, int rank, const int (&at)[5]) {
    if (blocks != launched.cluster)
        fail("copy_tensor_to_all: to " + std::to_string(blocks) + " blocks of a cluster of " + std::to_string(launched.cluster));
    for (int i = 0; i < blocks; ++i) {
        In other(i, "copy_tensor_to_all");
        copy_tensor(there(static_cast<char*>(to)), map, there(barrier), rank, at);
    }
}

void copy_tensor(void* to, const TensorMap* map, Barrier* barrier, int rank, const int (&at)[5]) {
    uint32_t address = block_at(to, map, rank, "copy_tensor");
    BarrierState& b = state(barrier, "copy_tensor");
    if (!b.known) fail("copy_tensor: no barrier_init_done since the initialisation of " + text(b));
    poison(address - FIRST, bytes_of(*map));
    Event e{};
    e.of_tensor = true;
    e.map = *map;
    e.to = address;
    std::copy(at, at + 5, e.at);
    e.thread = current;
    if (block->early)
        land(b, e);
    else
        b.events.push_back(std::move(e));
}

void fence_copy_engine() {
    Thread& t = *current;
    for (int64_t at : t.unseen) std::memcpy(block->engine_view + at, shared() + at, 4);
    t.unseen.clear();
    for (auto [at, bytes] : block->landed) std::memcpy(block->engine_view + at, shared() + at, static_cast<size_t>(bytes));
    block->landed.clear();
}

void store_tensor(const TensorMap* map, const void* from, int rank, const int (&at)[5]) {
    Thread& t = *current;
    Store s{*map, block_at(from, map, rank, "store_tensor"), {}, t.store_groups, draw() % 2 == 0};
    std::copy(at, at + 5, s.at);
    if (s.early) make(s);
    t.stores.push_back(s);
}

void stores_commit() { ++current->store_groups; }

void stores_wait(int pending) {
    Thread& t = *current;
    size_t left = 0;
    for (const Store& s : t.stores) {
        if (s.group >= t.store_groups - pending)
            t.stores[left++] = s;
        else if (!s.early)
            make(s);
    }
    t.stores.resize(left);
}

void store_matrices(void* row, const uint32_t* r) {
    struct Request {
        char* row;
        const uint32_t* r;
    } request{static_cast<char*>(row), r};
    if (offset_of(row, 16, "store_matrices") % 16) fail("store_matrices: a row that is not aligned to 16 bytes");
    meet({"store_matrices", 0, 0}, &request, [](Warp& w) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                char* to = static_cast<Request*>(w.requests[8 * i + lane / 4])->row + lane % 4 * 4;
                std::memcpy(to, static_cast<Request*>(w.requests[lane])->r + i, 4);
                w.lanes[lane]->unseen.push_back(to - shared());
            }
    });
}

void store_pair(void* to, float low, float high) {
    int64_t offset = offset_of(to, 8, "store_pair");
    if (offset % 8) fail("store_pair: an address that is not aligned to 8 bytes");
    float pair[2] = {low, high};
    std::memcpy(to, pair, 8);
    for (int64_t at : {offset, offset + 4}) current->unseen.push_back(at);
}

void warpgroup_fence() {
    meet({"warpgroup_fence", 0, 0}, nullptr, [](Warp& w) { w.fenced = true; });
}

void warpgroup_commit() {
    meet({"warpgroup_commit", 0, 0}, nullptr, [](Warp& w) { ++w.groups; });
}

void warpgroup_wait(int pending) {
    Thread& t = *current;
    Warp& w = *t.warp;
    if (w.live < 32) fail("warpgroup_wait: lanes of the warp have returned");
    arrive_in_warp({"warpgroup_wait", pending, 0}, nullptr);
    if (w.arrived == 32) {
        int first = w.index / 4 * 4;
        if (32 * (first + 4) > launched.threads)
            fail("warpgroup_wait: a warpgroup has 4 warps, warp " + std::to_string(w.index) + " is in none");
        Meeting& m = block->warpgroups[w.index / 4];
        if (m.warps && m.threads != pending)
            fail("warps of a warpgroup diverge: this one is at " + w.operation.text() + ", another at warpgroup_wait<" +
                 std::to_string(m.threads) + ">");
        m.threads = pending;
        m.warps |= 1u << w.index;
        if (__builtin_popcount(m.warps) == 4) {
            finish_mmas(first, pending);
            release(m);
        }
    }
    if (w.waiting >> t.index % 32 & 1) wait();
}

void warpgroup_multiply_add(float* c, int columns, const uint32_t* a, uint64_t a_shared, uint64_t b, Dtype type,
                            bool across, bool a_across) {
    struct Request {
        float* c;
        const uint32_t* a;
        uint64_t a_shared, b;
    } request{c, a, a_shared, b};
    Operation operation{"warpgroup_multiply_add", static_cast<int>(type) * 8 + 4 * across + 2 * a_across + (a != nullptr), columns};
    meet(operation, &request, [&](Warp& w) {
        Mma mma{};
        mma.type = type;
        mma.columns = columns;
        mma.a_in_shared = a == nullptr;
        mma.across = across, mma.a_across = a_across;
        mma.a_descriptor = a_shared;
        mma.b_descriptor = b;
        mma.group = w.groups;
        for (int lane = 0; lane < 32; ++lane) {
            const Request& r = *static_cast<Request*>(w.requests[lane]);
            if (r.b != b || r.a_shared != a_shared)
                fail("warpgroup_multiply_add: lane " + std::to_string(lane) + " has another descriptor");
            mma.a_registers[lane] = r.a;
            if (r.a) std::copy(r.a, r.a + 4, mma.a[lane]);
        }
        float* first = static_cast<Request*>(w.requests[0])->c;
        for (const Mma& earlier : w.mmas)
            if (earlier.sums->c[0] == first) mma.sums = earlier.sums;
        if (mma.sums && mma.sums->columns != columns)
            fail("warpgroup_multiply_add: two shapes under way on the same sums");
        // Registers may have been written since the last wait. Those of sums that are under way can't have been.
        if (!w.fenced && !(mma.sums && mma.a_in_shared))
            fail("warpgroup_multiply_add: no warpgroup_fence since the last warpgroup_wait");
        if (!mma.sums) {
            mma.sums = std::make_shared<Sums>();
            mma.sums->columns = columns;
            mma.sums->values.resize(static_cast<size_t>(16 * columns));
            for (int lane = 0; lane < 32; ++lane) {
                float* mine = mma.sums->c[lane] = static_cast<Request*>(w.requests[lane])->c;
                for (int i = 0; i < columns / 2; ++i) {
                    *of_lane(*mma.sums, lane, i) = mine[i];
                    mine[i] = float_of(0xffffffff);
                }
            }
        }
        w.mmas.push_back(std::move(mma));
    });
}

constexpr int64_t SEE_EARLY = 16;  // clusters for which what is early is taken away again, which takes a while

void run(void (*call)(const void*, const void*), const void* kernel, const void* arguments, int64_t count,
         int threads_per_block, int shared_bytes, int cluster, const std::string& what, void* early, int64_t early_bytes) {
    static std::mutex one_launch;  // the state is of one block
    std::lock_guard<std::mutex> lock(one_launch);
    std::string where = what + " (" + std::to_string(count) + " blocks of " + std::to_string(threads_per_block) +
                        " threads, " + std::to_string(shared_bytes) + " bytes of shared memory)";
    if (count < 1 || count > 0x7fffffff || cluster < 1 || cluster > MOST_BLOCKS || count % cluster || threads_per_block < 1 || threads_per_block > MOST_THREADS ||
        shared_bytes < 0 || shared_bytes > MOST_SHARED)
        throw std::runtime_error(where + ": CUDA would refuse this launch");
    const char* seed = std::getenv("VITKERNELS_HOST_SEED");
    launched.call = call;
    launched.kernel = kernel;
    launched.arguments = arguments;
    launched.threads = threads_per_block;
    launched.shared_bytes = shared_bytes;
    launched.cluster = cluster;
    launched.at_cluster = 0;
    launched.failed = false;
    launched.early = early;
    launched.to_come.assign(static_cast<const char*>(early), static_cast<size_t>(early_bytes));
    current = nullptr;
    here.blocks = count;
    for (int i = 0; i < cluster; ++i) {
        block = blocks + i;
        make_stacks();
        fill_red_zone(block->arena, RED);
        fill_red_zone(shared() + shared_bytes, RED);
    }
    try {
        for (int64_t first = 0; first < count; first += cluster) {
            seed_with(seed ? std::strtoull(seed, nullptr, 10) : 1, first);
            for (int i = 0; i < cluster; ++i) block = blocks + i, start_block(first + i);
            launched.apart = cluster > 1 && draw() % 2;
            if (first < SEE_EARLY * cluster) {
                std::memset(early, 0xff, launched.to_come.size());
                launched.awaited = false;
            }
            run_cluster();
        }
        wait_for_prerequisites();  // as whoever comes next does
    } catch (const std::exception& e) {
        current = nullptr;
        throw std::runtime_error(where + ": " + e.what());
    }
}

}  // namespace vk::host
