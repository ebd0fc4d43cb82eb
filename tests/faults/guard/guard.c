/* malloc for fuzzing: every block of 1 KB or more ends where its memory ends, so that an access beyond it is a SIGSEGV,
   and so is any access once it is freed. New memory is filled with the byte GUARD_FILL, so that pixels which nobody has
   written differ between two runs. Preloaded by `neighbours`; Linux, x86-64 or aarch64. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096ul
#define ARENA (1ul << 42) /* addresses, not memory; none is used twice */
#define SMALLEST 1024ul

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static char *arena, *next;
static int fill = 0xA5;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct header { size_t mapped, size; }; /* on a page of its own, before the block's */

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("GUARD_FILL");
    if (text) fill = atoi(text);
    char *found = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found != MAP_FAILED) next = found, arena = found;
}

static int ours(const void *block) { return arena && (char *)block >= arena && (char *)block < arena + ARENA; }

static struct header *head(const void *block) {
    return (struct header *)(((uintptr_t)block & ~(PAGE - 1)) - PAGE);
}

static void *guarded(size_t size, size_t alignment) {
    if (alignment < 16) alignment = 16;
    if (!arena || size < SMALLEST || size > (1ul << 32) || alignment > PAGE) return NULL;
    size_t room = (size + alignment - 1) / alignment * alignment; /* up to alignment - 1 bytes go unwatched */
    size_t pages = (room + PAGE - 1) / PAGE * PAGE, whole = pages + 2 * PAGE;
    pthread_mutex_lock(&lock);
    char *place = next + whole <= arena + ARENA ? next : NULL;
    if (place) next += whole;
    pthread_mutex_unlock(&lock);
    if (!place || mprotect(place, PAGE + pages, PROT_READ | PROT_WRITE)) return NULL;
    *(struct header *)place = (struct header){PAGE + pages, size};
    char *block = place + PAGE + pages - room;
    if ((uintptr_t)block / PAGE != (uintptr_t)(place + PAGE) / PAGE) return NULL; /* cannot be: room fills its pages */
    memset(block, fill, size);
    return block;
}

void *malloc(size_t size) {
    void *block = guarded(size, 16);
    return block ? block : __libc_malloc(size);
}

void free(void *block) {
    if (!ours(block)) { __libc_free(block); return; }
    struct header *before = head(block);
    size_t mapped = before->mapped;
    madvise(before, mapped, MADV_DONTNEED);
    mprotect(before, mapped, PROT_NONE);
}

void *calloc(size_t count, size_t size) {
    if (size && count > (size_t)-1 / size) { errno = ENOMEM; return NULL; }
    void *block = guarded(count * size, 16);
    return block ? memset(block, 0, count * size) : __libc_calloc(count, size);
}

void *realloc(void *block, size_t size) {
    if (block && !ours(block) && size < SMALLEST) return __libc_realloc(block, size);
    if (block && !ours(block)) return __libc_realloc(block, size);
    void *fresh = malloc(size);
    if (!fresh || !block) return fresh;
    size_t before = head(block)->size;
    memcpy(fresh, block, before < size ? before : size);
    free(block);
    return fresh;
}

void *memalign(size_t alignment, size_t size) {
    void *block = guarded(size, alignment);
    return block ? block : __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **found, size_t alignment, size_t size) {
    void *block = memalign(alignment, size);
    if (!block) return ENOMEM;
    *found = block;
    return 0;
}

size_t malloc_usable_size(void *block) {
    if (ours(block)) return head(block)->size;
    static size_t (*real)(void *);
    if (!real) real = (size_t(*)(void *))dlsym(RTLD_NEXT, "malloc_usable_size");
    return real(block);
}
