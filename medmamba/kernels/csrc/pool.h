#pragma once
#include <stddef.h>

// Runs task(context, scratch, i) for every i in [0, count) on up to `threads` threads, the caller among them, each with
// `scratch_bytes` of its own, aligned to 64 bytes and uninitialised. Returns 0, or 1 where memory ran out.
typedef void task_fn(const void *context, void *scratch, ptrdiff_t i);
int pool_run(task_fn *task, const void *context, ptrdiff_t count, ptrdiff_t threads, size_t scratch_bytes);

// From here on, pool_run in the calling thread uses the threads of `run`, which calls piece(data, i) for every i in
// [0, count), in place of the pool's own; with NULL, the pool's again.
typedef void host_fn(void *host, void (*piece)(void *data, size_t i), size_t count, void *data);
void pool_borrow(host_fn *run, void *host);

// malloc and free for what lives as long as a call. Blocks are kept for the next call: fresh memory comes in pages that
// the system has to clear, which can take longer than the work on them.
void *memory_take(size_t bytes);
void memory_give(void *block);
