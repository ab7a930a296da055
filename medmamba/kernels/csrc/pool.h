#pragma once
#include <stddef.h>

// Runs task(context, scratch, i) for every i in [0, count) on up to `threads` threads, including the caller. Each
// thread gets `scratch_bytes` of uninitialised memory, aligned to 64 bytes. Returns 0, or 1 if out of memory.
typedef void task_fn(const void *context, void *scratch, ptrdiff_t i);
int pool_run(task_fn *task, const void *context, ptrdiff_t count, ptrdiff_t threads, size_t scratch_bytes);

// Makes pool_run in the calling thread use the threads of `run`, which calls piece(data, i) for every i in [0, count),
// instead of the pool's own; NULL restores the pool's own.
typedef void host_fn(void *host, void (*piece)(void *data, size_t i), size_t count, void *data);
void pool_borrow(host_fn *run, void *host);

// malloc and free for memory that is needed during one call. Blocks are kept for the next call, because the system has
// to clear the pages of new memory, which can take longer than the work on them.
void *memory_take(size_t bytes);
void memory_give(void *block);
