// The handlers that a compiled kernel calls where a sanitizer finds an out-of-bounds access or an overflow. (The sanitizers'
// own handlers would end the process.)
#pragma once

extern "C" {

// The first option lets a library bring the sanitizer into a process that was started without it.
const char* __asan_default_options() {
    return "verify_asan_link_order=0:detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0";
}

// For Python, which finds the array's name and the source lines: the address that was accessed, and the call stack, innermost
// first, as offsets from the start of the library.
const char* faulty_address;
intptr_t faulty_calls[16];
extern const char library_start[] asm("__ehdr_start") __attribute__((visibility("hidden")));

static void report(const char* does, const char* address) {
    faulty_address = address;
    memset(faulty_calls, 0, sizeof faulty_calls);
    void** frame = (void**)__builtin_frame_address(0);      // the saved frame pointer of the caller, and the return address
    for (int i = 0; i < 16 && frame[1]; i++, frame = (void**)frame[0]) faulty_calls[i] = (char*)frame[1] - 1 - library_start;
    cuda_on_cpu::fail("thread (%u, %u, %u) %s", threadIdx.x, threadIdx.y, threadIdx.z, does);
}

#define REPORT(name, does, ...) void __asan_report_##name(const char* address __VA_ARGS__) { report(does, address); }
#define REPORT_ALL(load, reads) \
    REPORT(load##1, reads " 1 byte") REPORT(load##2, reads " 2 bytes") REPORT(load##4, reads " 4 bytes") \
    REPORT(load##8, reads " 8 bytes") REPORT(load##16, reads " 16 bytes") REPORT(load##_n, reads " several bytes", , size_t)
REPORT_ALL(load, "reads")
REPORT_ALL(store, "writes")

void __ubsan_handle_add_overflow() { report("overflows an integer", nullptr); }
void __ubsan_handle_sub_overflow() { report("overflows an integer", nullptr); }
void __ubsan_handle_mul_overflow() { report("overflows an integer", nullptr); }
void __ubsan_handle_negate_overflow() { report("overflows an integer", nullptr); }
void __ubsan_handle_divrem_overflow() { report("divides an integer by zero", nullptr); }
void __ubsan_handle_shift_out_of_bounds() { report("shifts by a negative number or too many bits", nullptr); }
void __ubsan_handle_out_of_bounds() { report("exceeds the bounds of an array", nullptr); }
void __ubsan_handle_type_mismatch_v1() { report("uses a null pointer, or one not aligned for its type", nullptr); }

}
