// Push the callee-saved registers, switch to the other stack, and pop the registers saved there. The C library's swapcontext
// also makes a system call, and takes a hundred times as long.
//
// A new stack starts with SAVED_WORDS words. All are 0 except the one at RETURN_ADDRESS: the function to start.
#pragma once

extern "C" void switch_stack(void** save_stack_pointer, void* stack_pointer) asm("cuda_on_cpu_switch_stack");
#if defined(__x86_64__)
constexpr int SAVED_WORDS = 8, RETURN_ADDRESS = 6;
asm(R"(
    .text
    .globl cuda_on_cpu_switch_stack
cuda_on_cpu_switch_stack:
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
)");
#elif defined(__aarch64__)
constexpr int SAVED_WORDS = 20, RETURN_ADDRESS = 11;
asm(R"(
    .text
    .p2align 2
    .globl cuda_on_cpu_switch_stack
cuda_on_cpu_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
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
    ldp x19, x20, [sp]
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
)");
#else
#error "switch_stack is written for x86-64 and 64-bit Arm only"
#endif
