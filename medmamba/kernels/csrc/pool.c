// Worker threads that persist between calls. They sleep in between, hold no lock while they work and own nothing that
// needs a destructor, so neither fork nor process exit has to wait for them.
#include "pool.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <windows.h>
static SRWLOCK lock = SRWLOCK_INIT;
static CONDITION_VARIABLE wake = CONDITION_VARIABLE_INIT, done = CONDITION_VARIABLE_INIT;
static void acquire(void) { AcquireSRWLockExclusive(&lock); }
static void release(void) { ReleaseSRWLockExclusive(&lock); }
static void wait_for(CONDITION_VARIABLE *event) { SleepConditionVariableSRW(event, &lock, INFINITE, 0); }
static void notify(CONDITION_VARIABLE *event) { WakeAllConditionVariable(event); }
#else
#include <pthread.h>
#include <signal.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static void acquire(void) { pthread_mutex_lock(&lock); }
static void release(void) { pthread_mutex_unlock(&lock); }
static void wait_for(pthread_cond_t *event) { pthread_cond_wait(event, &lock); }
static void notify(pthread_cond_t *event) { pthread_cond_broadcast(event); }
#endif

// --- memory ---------------------------------------------------------------------------------------------------------

enum { KEPT = 8, HEADER = 64 };
static const size_t KEPT_BYTES = (size_t)128 << 20;
// Guarded by `lock`. Each block starts with its size.
static void *kept[KEPT];
static size_t kept_bytes;

static size_t size_of(void *block) { return *(size_t *)block; }

void *memory_take(size_t bytes) {
    int best = -1;
    acquire();
    for (int i = 0; i < KEPT; i++)
        if (kept[i] && size_of(kept[i]) >= bytes && (best < 0 || size_of(kept[i]) < size_of(kept[best]))) best = i;
    void *block = best < 0 ? NULL : kept[best];
    if (block) {
        kept_bytes -= size_of(block);
        kept[best] = NULL;
    }
    release();
    if (!block) {
        if (bytes > PTRDIFF_MAX - HEADER || !(block = malloc(bytes + HEADER))) return NULL;
        *(size_t *)block = bytes;
    }
    return (char *)block + HEADER;
}

void memory_give(void *memory) {
    if (!memory) return;
    void *block = (char *)memory - HEADER;
    acquire();
    int smallest = 0;  // an empty slot, if there is one
    for (int i = 1; i < KEPT && kept[smallest]; i++)
        if (!kept[i] || size_of(kept[i]) < size_of(kept[smallest])) smallest = i;
    size_t place = kept[smallest] ? size_of(kept[smallest]) : 0;
    if (size_of(block) > place && size_of(block) <= KEPT_BYTES - (kept_bytes - place)) {
        void *replaced = kept[smallest];
        kept[smallest] = block;
        kept_bytes += size_of(block) - place;
        block = replaced;
    }
    release();
    free(block);
}

// --- threads --------------------------------------------------------------------------------------------------------

enum { MAX_WORKERS = 255 };

typedef struct {
    task_fn *task;
    const void *context;
    char *scratch;
    size_t scratch_bytes;
    ptrdiff_t count;
    atomic_ptrdiff_t next;
} Job;

// Guarded by `lock`.
static Job *job;          // the job that workers may join, NULL between calls
static ptrdiff_t seats;   // how many more workers may join
static ptrdiff_t active;  // how many workers are working on it
static ptrdiff_t workers;
// Only one call uses the workers at a time; a concurrent call from another thread does all its work itself.
static atomic_flag taken = ATOMIC_FLAG_INIT;

static void work(Job *j, ptrdiff_t seat) {
    void *scratch = j->scratch + (size_t)seat * j->scratch_bytes;
    for (ptrdiff_t i; (i = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed)) < j->count;)
        j->task(j->context, scratch, i);
}

#if defined(_WIN32)
static DWORD WINAPI worker(LPVOID unused) {
#else
static void *worker(void *unused) {
#endif
    (void)unused;
    acquire();
    for (;;) {
        while (!job || !seats) wait_for(&wake);
        Job *j = job;
        ptrdiff_t seat = seats--;
        active++;
        release();
        work(j, seat);
        acquire();
        if (!--active) notify(&done);
    }
}

static int start_worker(void) {
#if defined(_WIN32)
    HANDLE thread = CreateThread(NULL, 0, worker, NULL, 0, NULL);
    if (thread) CloseHandle(thread);
    return thread != NULL;
#else
    // Blocks all signals in the worker: they are for the threads of the interpreter.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int failed = pthread_create(&thread, NULL, worker, NULL);
    if (!failed) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !failed;
#endif
}

#if !defined(_WIN32)
// A forked child only has the thread that forked, so it starts with an empty pool and new locks.
static void after_fork(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    wake = done = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    job = NULL;
    seats = active = workers = 0;
    memset(kept, 0, sizeof kept);  // leaked: another thread may have been changing the list
    kept_bytes = 0;
    atomic_flag_clear(&taken);
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }
#endif

// The thread pool of the host application, if this thread was lent one by pool_borrow.
static _Thread_local host_fn *host_run;
static _Thread_local void *host;

void pool_borrow(host_fn *run, void *h) {
    host_run = run;
    host = h;
}

static void work_in_host(void *j, size_t seat) { work(j, (ptrdiff_t)seat); }

int pool_run(task_fn *task, const void *context, ptrdiff_t count, ptrdiff_t threads, size_t scratch_bytes) {
    if (threads > count) threads = count;
    if (threads > MAX_WORKERS + 1) threads = MAX_WORKERS + 1;
    int hosted = host_run && threads > 1;
    int alone = hosted || threads < 2 || atomic_flag_test_and_set_explicit(&taken, memory_order_acquire);
    if (alone && !hosted) threads = 1;
    scratch_bytes = (scratch_bytes + 63) / 64 * 64;
    char *memory = memory_take((size_t)threads * scratch_bytes + 64);
    int failed = !memory;
    if (!failed) {
        char *aligned = (char *)(((uintptr_t)memory + 63) / 64 * 64);
        Job j = {.task = task, .context = context, .scratch = aligned, .scratch_bytes = scratch_bytes, .count = count};
        if (!alone) {
            acquire();
            while (workers < threads - 1 && start_worker()) workers++;
            job = &j;
            seats = threads - 1;
            notify(&wake);
            release();
        }
        if (hosted)
            host_run(host, work_in_host, (size_t)threads, &j);
        else
            work(&j, 0);
        if (!alone) {
            acquire();
            job = NULL;
            while (active) wait_for(&done);
            release();
        }
        memory_give(memory);
    }
    if (!alone) atomic_flag_clear_explicit(&taken, memory_order_release);
    return failed;
}
