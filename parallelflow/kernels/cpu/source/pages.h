// Fresh memory in large pages: the system clears and maps a page when it is first touched, which 4 KiB at a time takes a
// tenth of a forward pass, and most of a large batch's step.
#pragma once

#include <cstdint>
#include <sys/mman.h>

static inline void in_large_pages(void* memory, long bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (memory && first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: nothing is lost without
#endif
}
