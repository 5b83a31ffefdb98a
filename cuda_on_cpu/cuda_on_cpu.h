// The part of CUDA C that is needed to compile a kernel with g++ and run it on the CPU. See README.md.
//
// The blocks of a grid run one after another. Each thread of a block is a fiber with its own stack. It runs until it has to
// wait, at a barrier or for its warp, and then switches to the stack of the next thread that is ready.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <utility>
#include "switch_stack.h"
#undef INFINITY     // NVRTC, NVIDIA's run-time compiler, does not define it, nor NAN
#undef NAN

// ---------------------------------------------------------------------------------------------------------------------
// The language

#define __global__ __attribute__((visibility("hidden")))     // or a kernel named write would replace the C library's function
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define UNCHECKED __attribute__((no_sanitize("address")))
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes)
#define UNCHECKED
#endif

namespace cuda_on_cpu {

// ---------------------------------------------------------------------------------------------------------------------
// The state of a launch, and aborting it

constexpr int MAX_THREADS = 1024, MAX_DYNAMIC_SHARED = 47 * 1024;      // per block, see launcher.py
constexpr int GUARD = 64;                                               // bytes after the dynamic shared memory
constexpr size_t STACK = 128 * 1024, STACK_GUARD = 16 * 1024;           // bytes; touching the guard is a segmentation fault
constexpr int UNSET = 0xFF;                                             // floats made of such bytes are NaN, integers -1

enum State { FRESH, READY, RUNNING, AT_BARRIER, IN_WARP, DONE };

struct Fiber {
    void* stack_pointer;
    char* stack;
};

struct Warp;
typedef void Work(const Warp& warp);

struct Thread {
    uint3 index;
    State state;
    Fiber* fiber;           // once it has started
    int line;               // of the source, where it waits
    unsigned mask;          // the lanes it waits for, one bit each
    Work* work;             // for an instruction of the whole warp: what the last lane to arrive does for all, else null
    bool waits() const { return state == AT_BARRIER || state == IN_WARP; }
};

// Every lane offers a value; the last to arrive copies them all. So a lane that resumes early can offer its next value while
// others still have to read this one. For an instruction of the whole warp, every lane offers the address of its registers.
struct Warp {
    unsigned live, arrived;
    unsigned participants[32];
    uint64_t offered[32], exchanged[32];
    template <class T> T& registers(int lane) const { return *(T*)exchanged[lane]; }
};

static const char *kernel_name, *file, *arguments;
static void (*kernel)(const char* arguments);
static int size, step;                      // threads of a block; 1, or -1 to run them in reverse order
static Thread threads[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static int current, live, at_barrier;       // the running thread; how many have not returned; how many wait at a barrier
static Fiber fibers[MAX_THREADS], launcher, *idle[MAX_THREADS], *running;
static int fiber_count, idle_count;
static char message[1000];

// Shared memory. A declaration `__shared__ T name` is compiled as `static Shared<T>`, which registers its address when the
// first thread reaches it. A declaration `extern __shared__` is compiled as a pointer to dynamic_shared.
static struct { void* start; size_t bytes; } shared[1024];
static int shared_count;
alignas(16) static char dynamic_shared[MAX_DYNAMIC_SHARED + GUARD];

template <class T> struct Shared {
    T object;
    Shared() {
        shared[shared_count++] = {&object, sizeof object};
        memset((void*)&object, UNSET, sizeof object);
    }
};

static void switch_to(Fiber* fiber) {
    Fiber* from = running;
    running = fiber;
    switch_stack(&from->stack_pointer, fiber->stack_pointer);
}

// Aborts the launch with a message. The fibers are left as they are; the next launch resets their stacks.
__attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    int length = snprintf(message, sizeof message, "%s: block (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    va_list values;
    va_start(values, format);
    vsnprintf(message + length, sizeof message - length, format, values);
    va_end(values);
    fiber_count = idle_count = 0;
    if (running != &launcher) switch_to(&launcher);
}

static void fail_thread(const char* does, int line) {
    fail("thread (%u, %u, %u) %s at %s:%d", threadIdx.x, threadIdx.y, threadIdx.z, does, file, line);
}

static void fail_waiting(const char* what) {
    char places[700] = "";
    int length = 0, returned = 0;
    bool listed[MAX_THREADS] = {};
    for (int i = 0; i < size; i++) {
        returned += threads[i].state == DONE;
        if (listed[i] || !threads[i].waits() || length > 500) continue;
        int count = 0;
        for (int j = i; j < size; j++)
            if (threads[j].waits() && threads[j].line == threads[i].line) listed[j] = true, count++;
        const uint3& first = threads[i].index;
        length += snprintf(places + length, sizeof places - length, "; %d wait at %s:%d, the first being (%u, %u, %u)",
                           count, file, threads[i].line, first.x, first.y, first.z);
    }
    fail("%s: of %d threads %d have returned%s", what, size, returned, places);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling the threads

static void run_threads();

static Fiber* take_fiber() {
    if (idle_count > 0) return idle[--idle_count];
    Fiber* fiber = &fibers[fiber_count];
    if (!fiber->stack) {
        fiber->stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(fiber->stack, STACK_GUARD, PROT_NONE);
    }
    ASAN_UNPOISON_MEMORY_REGION(fiber->stack + STACK_GUARD, STACK - STACK_GUARD);
    // The stacks start at different offsets within a page, or they would compete for the same cache lines.
    void** saved = (void**)(fiber->stack + STACK) - 8 * (fiber_count++ % 32) - SAVED_WORDS;
    memset(saved, 0, SAVED_WORDS * sizeof *saved);
    saved[RETURN_ADDRESS] = (void*)run_threads;
    fiber->stack_pointer = saved;
    return fiber;
}

// The next thread after the current one that is ready, in the block's order and cyclically within [start, stop). -1 if none is.
static int next_thread(int start, int stop) {
    for (int i = start, next = current; i < stop; i++) {
        next += step;
        if (next == stop) next = start;
        if (next < start) next = stop - 1;
        if (threads[next].state <= READY) return next;
    }
    return -1;
}

// A warp runs as far as it can before the next one runs: far enough ahead to reveal a missing barrier.
static int next_thread() {
    int start = current / 32 * 32, next = next_thread(start, start + 32 < size ? start + 32 : size);
    return next < 0 ? next_thread(0, size) : next;
}

static void switch_to_thread(int next) {
    Thread& thread = threads[next];
    if (thread.state == FRESH) thread.fiber = take_fiber();
    thread.state = RUNNING;
    threadIdx = thread.index;
    current = next;
    if (thread.fiber != running) switch_to(thread.fiber);
}

static void let_others_run() {
    int next = next_thread();
    if (next < 0) fail_waiting("deadlock");
    switch_to_thread(next);
}

static void release_barrier() {
    int line = 0;
    for (int i = 0; i < size; i++) {
        if (threads[i].state != AT_BARRIER) continue;
        if (line && threads[i].line != line) fail_waiting("threads wait at different barriers");
        line = threads[i].line;
    }
    for (int i = 0; i < size; i++)
        if (threads[i].state == AT_BARRIER) threads[i].state = READY;
    at_barrier = 0;
}

static void barrier(int line) {
    threads[current].state = AT_BARRIER;
    threads[current].line = line;
    if (++at_barrier == live) release_barrier();
    let_others_run();
}

// Completes the exchange among the lanes of `mask`, if all that have not returned have arrived.
static void complete_exchange(int warp_index, unsigned mask) {
    Warp& warp = warps[warp_index];
    unsigned lanes = mask & warp.live;
    if (lanes & ~warp.arrived) return;
    Thread* first = nullptr;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        int lane = __builtin_ctz(rest);
        Thread& thread = threads[32 * warp_index + lane];
        if (!first) first = &thread;
        if (thread.mask != mask || thread.line != first->line || thread.work != first->work)
            fail_waiting("lanes of a warp differ in intrinsic or in mask");
        warp.exchanged[lane] = warp.offered[lane];
        warp.participants[lane] = lanes;
    }
    if (first->work) {
        if (lanes != ~0u) fail_waiting("an instruction of a whole warp lacks lanes");
        first->work(warp);
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1) threads[32 * warp_index + __builtin_ctz(rest)].state = READY;
    warp.arrived &= ~lanes;
}

static Warp& exchange(unsigned mask, uint64_t value, int line, Work* work = nullptr) {
    int lane = current % 32;
    Warp& warp = warps[current / 32];
    if (!(mask >> lane & 1)) fail_thread("is not in its own mask", line);
    threads[current].state = IN_WARP;
    threads[current].line = line;
    threads[current].mask = mask;
    threads[current].work = work;
    warp.offered[lane] = value;
    warp.arrived |= 1u << lane;
    complete_exchange(current / 32, mask);
    let_others_run();
    return warp;
}

// The current thread has returned: others stop waiting for it.
static void finish() {
    Warp& warp = warps[current / 32];
    threads[current].state = DONE;
    warp.live &= ~(1u << current % 32);
    for (unsigned rest = warp.arrived; rest; ) {
        unsigned mask = threads[current / 32 * 32 + __builtin_ctz(rest)].mask;
        complete_exchange(current / 32, mask);
        rest &= ~mask;
    }
    if (--live > 0 && at_barrier == live) release_barrier();
}

// The main loop of a fiber: it runs one thread after another. A thread that waits keeps its fiber, and another fiber runs the
// next thread. So if a kernel never waits, all threads run on a single fiber, at the speed of a loop.
static void run_threads() {
    for (;;) {
        kernel(arguments);
        finish();
        int next = next_thread();
        if (next < 0 && live > 0) fail_waiting("deadlock");
        idle[idle_count++] = running;
        if (next < 0) switch_to(&launcher);
        else switch_to_thread(next);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching a grid

UNCHECKED static void unset_shared_memory(int dynamic_bytes) {
    for (int i = 0; i < shared_count; i++) memset(shared[i].start, UNSET, shared[i].bytes);
    memset(dynamic_shared, UNSET, dynamic_bytes + GUARD);
}

UNCHECKED static bool guard_untouched(int dynamic_bytes) {
    for (int i = 0; i < GUARD; i++)
        if (dynamic_shared[dynamic_bytes + i] != (char)UNSET) return false;
    return true;
}

static void run_block(int dynamic_bytes) {
    unset_shared_memory(dynamic_bytes);
    for (int i = 0; i < size; i++) threads[i].state = FRESH;
    for (int i = 0; i < size; i += 32) warps[i / 32].live = size - i < 32 ? (1u << (size - i)) - 1 : ~0u;
    live = size;
    switch_to_thread(step > 0 ? 0 : size - 1);
    if (!*message && !guard_untouched(dynamic_bytes)) fail("writes past its %d bytes of dynamic shared memory", dynamic_bytes);
}

// While it exists, denormals (floats below 1e-38) are flushed to zero, as CuPy tells NVIDIA's compiler to.
struct FlushDenormals {
#if defined __x86_64__
    unsigned before = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }       // results, and operands
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined __aarch64__
    unsigned long before = __builtin_aarch64_get_fpcr();
    FlushDenormals() { __builtin_aarch64_set_fpcr(before | 1 << 24); }
    ~FlushDenormals() { __builtin_aarch64_set_fpcr(before); }
#endif
};

// shape: gridDim, blockDim, and the bytes of dynamic shared memory. Returns an error message, or an empty string.
static const char* launch(const char* name, const char* source_file, void (*body)(const char*), const char* args,
                          const int* shape, bool reverse) {
    FlushDenormals flush_denormals;
    kernel_name = name;
    file = source_file;
    kernel = body;
    arguments = args;
    gridDim = {(unsigned)shape[0], (unsigned)shape[1], (unsigned)shape[2]};
    blockDim = {(unsigned)shape[3], (unsigned)shape[4], (unsigned)shape[5]};
    size = shape[3] * shape[4] * shape[5];
    step = reverse ? -1 : 1;
    for (int i = 0; i < size; i++)
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    for (Warp& warp : warps) warp.arrived = 0;
    at_barrier = 0;
    running = &launcher;
    *message = 0;
    ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, shape[6]);
    ASAN_POISON_MEMORY_REGION(dynamic_shared + shape[6], sizeof dynamic_shared - shape[6]);
    uint3& b = blockIdx;
    for (b.z = 0; b.z < gridDim.z && !*message; b.z++)
        for (b.y = 0; b.y < gridDim.y && !*message; b.y++)
            for (b.x = 0; b.x < gridDim.x && !*message; b.x++) run_block(shape[6]);
    fflush(stdout);
    return message;
}

// Calls a kernel with the arguments at `args`, which are eight bytes apart.
template <class... Parameters, size_t... i>
static void call(void (*function)(Parameters...), const char* args, std::index_sequence<i...>) {
    function(*(Parameters*)(args + 8 * i)...);
}

// ---------------------------------------------------------------------------------------------------------------------
// Intrinsics. As a default argument, __builtin_LINE() is the line of the call.

template <class T> static T shuffle(unsigned mask, T value, int source, int line) {
    static_assert(sizeof value <= 8, "a shuffle hands over 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    int lane = current % 32;
    const Warp& warp = exchange(mask, bits, line);
    if (warp.participants[lane] >> source & 1) memcpy(&value, &warp.exchanged[source], sizeof value);
    else memset(&value, UNSET, sizeof value);
    return value;
}

static unsigned ballot(unsigned mask, bool predicate, int line) {
    int lane = current % 32;
    const Warp& warp = exchange(mask, predicate, line);
    unsigned bits = 0;
    for (unsigned rest = warp.participants[lane]; rest; rest &= rest - 1)
        bits |= warp.exchanged[__builtin_ctz(rest)] ? rest & -rest : 0;
    return bits;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { cuda_on_cpu::exchange(mask, 0, line); }

// A lane reads from a lane of its own segment of `width` lanes.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current % 32, segment = lane / width * width;
    return cuda_on_cpu::shuffle(mask, value, segment + (source & (width - 1)), line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current % 32, segment = lane / width * width, source = lane - (int)delta;
    return cuda_on_cpu::shuffle(mask, value, source >= segment ? source : lane, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current % 32, segment = lane / width * width, source = lane + (int)delta;
    return cuda_on_cpu::shuffle(mask, value, source < segment + width ? source : lane, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current % 32, segment = lane / width * width, source = lane ^ bits;
    return cuda_on_cpu::shuffle(mask, value, source < segment + width ? source : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::ballot(mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::ballot(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::ballot(mask, !predicate, line) == 0;
}

template <class T, class U> T atomicAdd(T* address, U value) { T old = *address; *address += value; return old; }
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcs(T* address, T value) { *address = value; }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float normcdff(float x) { return erfc(-x * sqrt(0.5)) / 2; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
template <class T, class U> auto min(T x, U y) -> decltype(x + y) { return x < y ? x : y; }
template <class T, class U> auto max(T x, U y) -> decltype(x + y) { return x > y ? x : y; }
template <class To, class From> To same_bits(From from) { To to; memcpy(&to, &from, sizeof to); return to; }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. A tile of 8 by 8 bfloat16 numbers is spread over the lanes of a warp: lane i has those of row i / 4 in columns
// 2 * (i % 4), in the lower half of a register, and 2 * (i % 4) + 1.

namespace cuda_on_cpu {

inline unsigned bf16_bits(float x) {
    unsigned bits = __float_as_uint(x);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
inline float high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000); }

struct LoadRegisters { unsigned row[4], *tiles; };      // the row that the lane names, and where its part of the tiles goes

static void load(const Warp& warp) {
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < 4; k++)
            warp.registers<LoadRegisters>(lane).tiles[k] = warp.registers<LoadRegisters>(8 * k + lane / 4).row[lane % 4];
}

static void load_transposed(const Warp& warp) {
    for (int lane = 0; lane < 32; lane++) {
        int row = 2 * (lane % 4), column = lane / 4, shift = column % 2 * 16;
        for (int k = 0; k < 4; k++) {
            unsigned upper = warp.registers<LoadRegisters>(8 * k + row).row[column / 2] >> shift;
            unsigned lower = warp.registers<LoadRegisters>(8 * k + row + 1).row[column / 2] >> shift;
            warp.registers<LoadRegisters>(lane).tiles[k] = (upper & 0xFFFF) | lower << 16;
        }
    }
}

static bool in_shared_memory(const char* row) {
    if (row >= dynamic_shared && row + 16 <= dynamic_shared + MAX_DYNAMIC_SHARED) return true;
    for (int i = 0; i < shared_count; i++)
        if (row >= shared[i].start && row + 16 <= (char*)shared[i].start + shared[i].bytes) return true;
    return false;
}

static void load_tiles(unsigned* tiles, const void* row, int line, Work* work) {
    if ((uintptr_t)row % 16) fail_thread("loads a row of a tile that is not aligned to 16 bytes", line);
    uint4 numbers = *(const uint4*)row;
    if (!in_shared_memory((const char*)row)) fail_thread("loads a row of a tile from outside of shared memory", line);
    LoadRegisters registers = {{numbers.x, numbers.y, numbers.z, numbers.w}, tiles};
    exchange(~0u, (uint64_t)&registers, line, work);
}

struct MultiplyRegisters { float* c; const unsigned* a; unsigned b[2]; };

// The tiles of a are its upper and lower left, then its upper and lower right. Those of b, upper and lower, are transposed.
static void multiply(const Warp& warp) {
    typedef float Row __attribute__((vector_size(32)));
    unsigned a[16][8];
    Row b[16], c[16];
    for (int lane = 0; lane < 32; lane++) {
        const MultiplyRegisters& from = warp.registers<MultiplyRegisters>(lane);
        int row = lane / 4, column = 2 * (lane % 4);
        for (int k = 0; k < 4; k++) a[k % 2 * 8 + row][k / 2 * 4 + lane % 4] = from.a[k];
        for (int k = 0; k < 2; k++) {
            b[k * 8 + column][row] = low(from.b[k]);
            b[k * 8 + column + 1][row] = high(from.b[k]);
            memcpy((float*)&c[k * 8 + row] + column, from.c + 2 * k, 8);
        }
    }
    for (int k = 0; k < 8; k++)
        for (int row = 0; row < 16; row++) {
            c[row] += low(a[row][k]) * b[2 * k];
            c[row] += high(a[row][k]) * b[2 * k + 1];
        }
    for (int lane = 0; lane < 32; lane++)
        for (int k = 0; k < 2; k++)
            memcpy(warp.registers<MultiplyRegisters>(lane).c + 2 * k, (float*)&c[k * 8 + lane / 4] + 2 * (lane % 4), 8);
}

}  // namespace cuda_on_cpu

// What a kernel defines with inline PTX for a GPU: cvt.rn.bf16x2.f32, ldmatrix.m8n8.x4, the same with .trans, and mma.m16n8k16.
inline unsigned bf16_pair(float low, float high) { return cuda_on_cpu::bf16_bits(high) << 16 | cuda_on_cpu::bf16_bits(low); }
inline void load_tiles(unsigned (&tiles)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::load_tiles(tiles, row, line, cuda_on_cpu::load);
}
inline void load_tiles_transposed(unsigned (&tiles)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::load_tiles(tiles, row, line, cuda_on_cpu::load_transposed);
}
inline void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    cuda_on_cpu::MultiplyRegisters registers = {c, a, {b0, b1}};
    cuda_on_cpu::exchange(~0u, (uint64_t)&registers, line, cuda_on_cpu::multiply);
}

#ifdef __SANITIZE_ADDRESS__
#include "sanitizers.h"
#endif
