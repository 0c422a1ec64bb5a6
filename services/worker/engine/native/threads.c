/* A team of threads that work off one function together and wait for each other in between.
 *
 * Of our own because waiting decides everything here: a pass of a small model is hundreds of pieces of 10 to 100 us. Pieces
 * are taken one by one, so that a thread the system puts aside holds back the others by one piece at most. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

#define MOST_THREADS 64
/* Pieces of one run: a pass takes a dozen for each layer. */
#define MOST_ROUNDS 8192
/* Turns of waiting before a waiting thread offers its core to others at each further turn: some tens of microseconds. */
#define EAGER_TURNS 1000
/* An idle thread sleeps only after this long, which spans the pause between two steps (6 ms where 16 tokens are drawn from
 * whole vocabularies): a thread that is woken is put beside its waker as often as not, and then waits for the core that the
 * waker has. */
#define AWAKE_NS 10000000

struct rh_team {
    rh_work work;
    void *argument;
    int threads;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint phase;
    _Alignas(64) atomic_int taken[MOST_ROUNDS];
};

static rh_team team;
static pthread_mutex_t one_run_at_a_time = PTHREAD_MUTEX_INITIALIZER;
/* Which run, and by how many threads: (number << 8) | threads. In one word, since a thread that wakes late may see a later
 * run than the one that woke it: it takes part exactly if the word that it read says so, and then that run waits for it. */
static atomic_int runs;
static atomic_int sleepers;
/* Threads of the last run: those beyond it sleep until that grows, whatever runs. */
static atomic_int wanted = 1;
static atomic_int finished;
static int number;          /* of the last run; changes under the mutex, as does: */
static int started = 1;     /* threads there are, the caller included */

static void futex(atomic_int *word, int operation, int value) {
    syscall(SYS_futex, (int *)word, operation, value, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int wait_for_run(int seen) {
    int now;
    const int64_t sleep_at = now_ns() + AWAKE_NS;
    for (int turn = 0; turn < EAGER_TURNS || now_ns() < sleep_at; turn++) {
        if ((now = atomic_load_explicit(&runs, memory_order_acquire)) != seen) return now;
        turn < EAGER_TURNS ? _mm_pause() : (void)sched_yield();
    }
    while ((now = atomic_load(&runs)) == seen) {
        atomic_fetch_add(&sleepers, 1);
        futex(&runs, FUTEX_WAIT_PRIVATE, seen);
        atomic_fetch_sub(&sleepers, 1);
    }
    return now;
}

static void *serve(void *argument) {
    const int thread = (int)(intptr_t)argument;
    for (int seen = 0;;) {
        seen = wait_for_run(seen);
        if (thread >= (seen & 0xFF)) {
            const int count = atomic_load(&wanted);
            if (thread >= count) futex(&wanted, FUTEX_WAIT_PRIVATE, count);
            continue;
        }
        team.work(team.argument, &team, thread);
        atomic_fetch_add_explicit(&finished, 1, memory_order_release);
    }
    return NULL;
}

/* A child of fork has none of its parent's threads. */
static void forget_threads(void) {
    started = 1;
    number = 0;
    atomic_store(&runs, 0);
    atomic_store(&wanted, 1);
    atomic_store(&sleepers, 0);
    atomic_store(&team.arrived, 0);
    pthread_mutex_init(&one_run_at_a_time, NULL);
}

static void start_threads(int threads) {
    static int is_fork_watched;
    if (!is_fork_watched && threads > 1) is_fork_watched = pthread_atfork(NULL, NULL, forget_threads) == 0;
    for (; started < threads; started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)started) != 0) return;
        pthread_detach(thread);
    }
}

/* Runs work(argument, team, thread) on up to `threads` threads, the caller's included, and returns when all are done. */
void rh_run(int threads, rh_work work, void *argument) {
    pthread_mutex_lock(&one_run_at_a_time);
    start_threads(threads < MOST_THREADS ? threads : MOST_THREADS);
    team.threads = threads < started ? threads : started;
    team.work = work;
    team.argument = argument;
    memset((void *)team.taken, 0, sizeof team.taken);
    atomic_store_explicit(&finished, 1, memory_order_relaxed);
    if (atomic_load(&wanted) != team.threads) {
        atomic_store(&wanted, team.threads);
        futex(&wanted, FUTEX_WAKE_PRIVATE, MOST_THREADS);
    }
    if (team.threads > 1) {
        number = (number + 1) & 0x3FFFFF;
        atomic_store(&runs, number << 8 | team.threads);
        if (atomic_load(&sleepers)) futex(&runs, FUTEX_WAKE_PRIVATE, MOST_THREADS);
    }
    work(argument, &team, 0);
    for (int turn = 0; atomic_load_explicit(&finished, memory_order_acquire) < team.threads; turn++)
        turn < EAGER_TURNS ? _mm_pause() : (void)sched_yield();
    pthread_mutex_unlock(&one_run_at_a_time);
}

void rh_barrier(rh_team *t) {
    if (t->threads == 1) return;
    const unsigned phase = atomic_load_explicit(&t->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->threads - 1) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
        return;
    }
    for (int turn = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase; turn++)
        turn < EAGER_TURNS ? _mm_pause() : (void)sched_yield();
}

/* The next piece [first, last) of `count` things in pieces of `size`; 0 when none is left, and the round is over for this
 * thread. Every thread counts rounds alike in *round. */
int rh_next(rh_team *t, int *round, int count, int size, int *first, int *last) {
    const int begin = atomic_fetch_add_explicit(&t->taken[*round], size, memory_order_relaxed);
    if (begin >= count) {
        *round += 1;
        return 0;
    }
    *first = begin;
    *last = begin + size < count ? begin + size : count;
    return 1;
}
