/* Preloaded into the daemon: records what it does to the files of its home, makes calls on
 * them fail, and moves its clock. The harness steers it by a small file mapped by both.
 *
 * A record is written under the same lock as the call it tells of, so that the order of the
 * records is the order of the calls. Only calls on files below CHAOS_HOME are touched; the
 * processes that decode inherit neither the environment nor the descriptors.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_shift_ns;
    int32_t error;        /* errno that calls fail with; 0: none */
    int32_t every;        /* every so many-th call */
    int32_t no_inotify;   /* errno of inotify_init1 and inotify_add_watch */
    int32_t spare_sqlite; /* leave the database's files alone */
    int32_t starve;       /* every so many-th larger allocation is refused; 0: none */
    uint32_t asked;
    uint32_t calls;
    uint32_t failed;
    uint32_t shifted;   /* readings of a clock that was moved */
    uint32_t no_memory; /* allocations that were refused */
};

struct record {
    uint8_t op;
    uint8_t pad[3];
    uint32_t flags;
    uint64_t inode;
    int64_t offset;
    uint32_t path_len;
    uint32_t data_len;
};

enum { OPEN = 1, WRITE, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, SYNC, LINK };

#define FDS 65536
static char tracked[FDS]; /* 1: a file of the home, 2: one of the database's */
static struct control *control;
static struct control nothing;
static char home[PATH_MAX];
static size_t home_len;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real_##name)
int inotify_init1(int flags);
int inotify_add_watch(int fd, const char *path, uint32_t mask);
#define RESOLVE(name)                                                                             \
    static void *real_##name;                                                                     \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_CONTROL");
    control = &nothing;
    if (path) {
        int fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0) {
            void *map = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            if (map != MAP_FAILED) control = map;
            close(fd);
        }
    }
    if ((path = getenv("CHAOS_LOG"))) {
        int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
        close(fd);
    }
    if ((path = getenv("CHAOS_HOME"))) {
        strncpy(home, path, sizeof home - 1);
        home_len = strlen(home);
    }
}

static int kind_of(const char *path) {
    if (!home_len || strncmp(path, home, home_len) || (path[home_len] && path[home_len] != '/'))
        return 0;
    return strstr(path, "/lungwatch.db") ? 2 : 1;
}

static int resolved(int dirfd, const char *path, char *out) {
    char link[64], base[PATH_MAX];
    ssize_t n = 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return kind_of(out);
    }
    if (dirfd == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        if ((n = readlink(link, base, sizeof base - 1)) < 0) return 0;
        base[n] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    return kind_of(out);
}

static int fails(int kind) {
    if (!control->error || control->every < 1 || (kind == 2 && control->spare_sqlite)) return 0;
    if (__sync_add_and_fetch(&control->calls, 1) % control->every) return 0;
    __sync_add_and_fetch(&control->failed, 1);
    errno = control->error;
    return 1;
}

static int refused(void) {
    __sync_add_and_fetch(&control->failed, 1);
    errno = control->no_inotify;
    return -1;
}

static uint64_t inode_of(int fd) {
    struct stat st;
    return fstat(fd, &st) ? 0 : (uint64_t)st.st_ino;
}

/* With the lock held. */
static void note(uint8_t op, uint32_t flags, uint64_t inode, int64_t offset, const char *path,
                 const void *data, size_t data_len) {
    struct record r = {.op = op, .flags = flags, .inode = inode, .offset = offset};
    int saved = errno;
    if (log_fd < 0) return;
    r.path_len = path ? strlen(path) : 0;
    r.data_len = data_len;
    struct iovec parts[3] = {{&r, sizeof r}, {(void *)path, r.path_len}, {(void *)data, data_len}};
    RESOLVE(writev);
    if (REAL(writev)(log_fd, parts, 3) < 0) _exit(99);
    errno = saved;
}

static int track(int fd, int kind, const char *path, int flags) {
    if (fd >= 0 && fd < FDS) {
        tracked[fd] = kind;
        if (kind) note(OPEN, flags, inode_of(fd), 0, path, NULL, 0);
    }
    return fd;
}

#define OPENER(name, first, dirfd, call)                                                          \
    int name(first const char *path, int flags, ...) {                                            \
        RESOLVE(name);                                                                            \
        char full[PATH_MAX];                                                                      \
        mode_t mode = 0;                                                                          \
        int kind = resolved(dirfd, path, full), fd;                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                    \
            va_list args;                                                                         \
            va_start(args, flags);                                                                \
            mode = va_arg(args, mode_t);                                                          \
            va_end(args);                                                                         \
        }                                                                                         \
        if (!kind) {                                                                              \
            fd = REAL(name) call;                                                                 \
            if (fd >= 0 && fd < FDS) tracked[fd] = 0;                                             \
            return fd;                                                                            \
        }                                                                                         \
        if (fails(kind)) return -1;                                                               \
        pthread_mutex_lock(&lock);                                                                \
        fd = track(REAL(name) call, kind, full, flags);                                           \
        pthread_mutex_unlock(&lock);                                                              \
        return fd;                                                                                \
    }
#define NONE
#define NONE_COMMA ,
OPENER(open, NONE, AT_FDCWD, (path, flags, mode))
OPENER(open64, NONE, AT_FDCWD, (path, flags, mode))
OPENER(openat, int dirfd NONE_COMMA, dirfd, (dirfd, path, flags, mode))
OPENER(openat64, int dirfd NONE_COMMA, dirfd, (dirfd, path, flags, mode))

int close(int fd) {
    RESOLVE(close);
    if (fd >= 0 && fd < FDS) tracked[fd] = 0;
    return REAL(close)(fd);
}

static int kind_of_fd(int fd) { return fd >= 0 && fd < FDS ? tracked[fd] : 0; }

ssize_t write(int fd, const void *data, size_t n) {
    RESOLVE(write);
    int kind = kind_of_fd(fd);
    if (!kind) return REAL(write)(fd, data, n);
    if (fails(kind)) return -1;
    pthread_mutex_lock(&lock);
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t done = REAL(write)(fd, data, n);
    if (done > 0) note(WRITE, 0, inode_of(fd), at, NULL, data, done);
    pthread_mutex_unlock(&lock);
    return done;
}

#define PWRITER(name)                                                                             \
    ssize_t name(int fd, const void *data, size_t n, off_t at) {                                  \
        RESOLVE(name);                                                                            \
        int kind = kind_of_fd(fd);                                                                \
        if (!kind) return REAL(name)(fd, data, n, at);                                            \
        if (fails(kind)) return -1;                                                               \
        pthread_mutex_lock(&lock);                                                                \
        ssize_t done = REAL(name)(fd, data, n, at);                                               \
        if (done > 0) note(WRITE, 0, inode_of(fd), at, NULL, data, done);                         \
        pthread_mutex_unlock(&lock);                                                              \
        return done;                                                                              \
    }
PWRITER(pwrite)
PWRITER(pwrite64)

#define ON_FD(name, params, args, op, at)                                                         \
    int name params {                                                                             \
        RESOLVE(name);                                                                            \
        int kind = kind_of_fd(fd);                                                                \
        if (!kind) return REAL(name) args;                                                        \
        if (fails(kind)) return -1;                                                               \
        pthread_mutex_lock(&lock);                                                                \
        int status = REAL(name) args;                                                             \
        if (!status) note(op, 0, inode_of(fd), at, NULL, NULL, 0);                                \
        pthread_mutex_unlock(&lock);                                                              \
        return status;                                                                            \
    }
ON_FD(ftruncate, (int fd, off_t size), (fd, size), TRUNCATE, size)
ON_FD(ftruncate64, (int fd, off_t size), (fd, size), TRUNCATE, size)
ON_FD(fsync, (int fd), (fd), SYNC, 0)
ON_FD(fdatasync, (int fd), (fd), SYNC, 0)

static int two(int status, uint8_t op, const char *from, const char *to) {
    if (!status) note(op, 0, 0, 0, from, to, strlen(to));
    pthread_mutex_unlock(&lock);
    return status;
}

#define ON_TWO(name, params, fromfd, tofd, args, op)                                              \
    int name params {                                                                             \
        RESOLVE(name);                                                                            \
        char a[PATH_MAX], b[PATH_MAX];                                                            \
        int kind = resolved(fromfd, from, a) | resolved(tofd, to, b);                             \
        if (!kind) return REAL(name) args;                                                        \
        if (fails(kind)) return -1;                                                               \
        pthread_mutex_lock(&lock);                                                                \
        return two(REAL(name) args, op, a, b);                                                    \
    }
ON_TWO(rename, (const char *from, const char *to), AT_FDCWD, AT_FDCWD, (from, to), RENAME)
ON_TWO(renameat, (int fromfd, const char *from, int tofd, const char *to), fromfd, tofd,
       (fromfd, from, tofd, to), RENAME)
ON_TWO(link, (const char *from, const char *to), AT_FDCWD, AT_FDCWD, (from, to), LINK)

#define ON_ONE(name, params, dirfd, args, op)                                                     \
    int name params {                                                                             \
        RESOLVE(name);                                                                            \
        char full[PATH_MAX];                                                                      \
        int kind = resolved(dirfd, path, full);                                                   \
        if (!kind) return REAL(name) args;                                                        \
        if (fails(kind)) return -1;                                                               \
        pthread_mutex_lock(&lock);                                                                \
        int status = REAL(name) args;                                                             \
        if (!status) note(op, 0, 0, 0, full, NULL, 0);                                            \
        pthread_mutex_unlock(&lock);                                                              \
        return status;                                                                            \
    }
ON_ONE(unlink, (const char *path), AT_FDCWD, (path), UNLINK)
ON_ONE(unlinkat, (int dirfd, const char *path, int flags), dirfd, (dirfd, path, flags),
       flags & AT_REMOVEDIR ? RMDIR : UNLINK)
ON_ONE(mkdir, (const char *path, mode_t mode), AT_FDCWD, (path, mode), MKDIR)
ON_ONE(rmdir, (const char *path), AT_FDCWD, (path), RMDIR)

static void shift(struct timespec *now) {
    int64_t by = control ? control->clock_shift_ns : 0;
    if (by) __sync_add_and_fetch(&control->shifted, 1);
    now->tv_sec += by / 1000000000;
    now->tv_nsec += by % 1000000000;
    if (now->tv_nsec < 0) now->tv_nsec += 1000000000, now->tv_sec--;
    if (now->tv_nsec >= 1000000000) now->tv_nsec -= 1000000000, now->tv_sec++;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    RESOLVE(clock_gettime);
    int status = REAL(clock_gettime)(id, now);
    if (!status && id == CLOCK_REALTIME) shift(now);
    return status;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int inotify_init1(int flags) {
    RESOLVE(inotify_init1);
    if (control->no_inotify) return refused();
    return REAL(inotify_init1)(flags);
}

int inotify_init(void) { return inotify_init1(0); }

int inotify_add_watch(int fd, const char *path, uint32_t mask) {
    RESOLVE(inotify_add_watch);
    if (control->no_inotify) return refused();
    return REAL(inotify_add_watch)(fd, path, mask);
}

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);

#define LARGER 16384 /* what an image takes, not what an interpreter's object takes */

static int starves(size_t size) {
    if (!control || control->starve < 1 || size < LARGER) return 0;
    if (__sync_add_and_fetch(&control->asked, 1) % control->starve) return 0;
    __sync_add_and_fetch(&control->no_memory, 1);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return starves(size) ? NULL : __libc_malloc(size); }

void *calloc(size_t count, size_t size) {
    size_t whole;
    int is_huge = __builtin_mul_overflow(count, size, &whole);
    return !is_huge && starves(whole) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *old, size_t size) {
    return starves(size) ? NULL : __libc_realloc(old, size);
}
