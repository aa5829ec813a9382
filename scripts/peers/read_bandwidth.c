/* SPDX-License-Identifier: Apache-2.0 */
/* How fast memory can be read: read_bandwidth BYTES THREADS, a worker of bench_peers.

Says {"engine": "memory", "bytes": ...} once its buffer is there; then answers each line of its input with the seconds of one pass
over the buffer, the median of at least three passes and half a second: {"seconds": 0.075}. The threads read it in
wide vectors, asking for lines ahead of time, as a kernel that streams weights does at its best. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MAX_THREADS 256
#define MAX_PASSES 1000
#define HUGE_PAGE (2 << 20)
#define CHUNK (2 * HUGE_PAGE)
#define LINE 64      /* bytes of a cache line, and of a vector */
#define AHEAD 4096   /* bytes between what is asked for and what is read */

typedef uint64_t vector __attribute__((vector_size(LINE)));

typedef struct {
    const char *buffer;
    size_t chunks;
    atomic_size_t next; /* whoever is free takes the next chunk: a thread that loses its core holds nobody up */
    atomic_uint_fast64_t sum;
} work;

static void *read_chunks(void *argument) {
    work *w = argument;
    vector sums[4] = {{0}};
    for (size_t chunk; (chunk = atomic_fetch_add(&w->next, 1)) < w->chunks;) {
        const char *at = w->buffer + chunk * CHUNK, *end = at + CHUNK;
        for (; at < end; at += 4 * LINE)
            for (int k = 0; k < 4; k++) {
                __builtin_prefetch(at + k * LINE + AHEAD);
                sums[k] ^= *(const vector *)(at + k * LINE);
            }
    }
    vector all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    atomic_fetch_add(&w->sum, all[0]); /* so that the compiler may not leave the reading out */
    return NULL;
}

static double now_s(void) {
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return moment.tv_sec + moment.tv_nsec * 1e-9;
}

static double pass(work *w, int threads) {
    pthread_t ids[MAX_THREADS];
    double start = now_s();
    w->next = 0;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&ids[i], NULL, read_chunks, w)) exit(1);
    read_chunks(w);
    for (int i = 1; i < threads; i++) pthread_join(ids[i], NULL);
    return now_s() - start;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    size_t bytes = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    int threads = argc > 2 ? atoi(argv[2]) : 0;
    if (threads < 1 || threads > MAX_THREADS || bytes < CHUNK) {
        fprintf(stderr, "usage: read_bandwidth BYTES THREADS, with at least %d bytes\n", CHUNK);
        return 2;
    }
    size_t chunks = bytes / CHUNK;
    char *buffer = aligned_alloc(HUGE_PAGE, chunks * CHUNK);
    if (buffer == NULL) return 1;
    madvise(buffer, chunks * CHUNK, MADV_HUGEPAGE);
    memset(buffer, 1, chunks * CHUNK);
    work w = {.buffer = buffer, .chunks = chunks};
    double scale = (double)bytes / ((double)chunks * CHUNK);
    printf("{\"engine\": \"memory\", \"bytes\": %zu}\n", bytes);
    fflush(stdout);
    static char line[4096];
    static double seconds[MAX_PASSES];
    while (fgets(line, sizeof line, stdin)) {
        int passes = 0;
        double start = now_s();
        pass(&w, threads);
        while (passes < 3 || (now_s() - start < 0.5 && passes < MAX_PASSES)) seconds[passes++] = pass(&w, threads);
        qsort(seconds, passes, sizeof *seconds, compare);
        printf("{\"seconds\": %.6f}\n", seconds[passes / 2] * scale);
        fflush(stdout);
    }
    return w.sum == 1;
}
