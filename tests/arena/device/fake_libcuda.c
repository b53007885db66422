/* A driver without a GPU, for the real Python bindings to call: it checks arguments as strictly as the documentation
   allows, keeps memory in a file in memory, and copies at once. Environment: FAKE_MEMORY (bytes), FAKE_FAIL
   ("name:call:code", the call-th call of a function fails), FAKE_LOG (a file), FAKE_VERSION, FAKE_VMM, FAKE_INTEGRATED.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int R;
typedef unsigned long long U;
enum { OK = 0, INVALID = 1, OOM = 2, UNINIT = 3, BAD_DEVICE = 101, BAD_CONTEXT = 201, ALREADY = 712, UNKNOWN_HOST = 713 };
#define GRAIN ((size_t)2 << 20)
#define MANY 4096

typedef struct { int type; int id; } Location;             /* CUmemLocation */
typedef struct {                                           /* CUmemAllocationProp */
  int type, handles; Location where; void *win;
  struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} Prop;
typedef struct { Location where; int flags; } Access;      /* CUmemAccessDesc */
typedef struct { size_t size; off_t at; int mapped, released, used; } Chunk;
typedef struct { uintptr_t start; size_t size; U handle; int access, used; } Span;

static int started, fd = -1;
static size_t total, taken;
static off_t end_of_file;
static Chunk chunks[MANY];
static Span ranges[MANY], maps[MANY], pins[MANY];
static int context;                   /* its address is the handle */
static __thread void *current[16];
static __thread int depth;
static int streams;

static long setting(const char *name, long otherwise) {
  const char *found = getenv(name);
  return found ? atol(found) : otherwise;
}

static void tell(const char *format, ...) {
  const char *path = getenv("FAKE_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  va_list list;
  va_start(list, format);
  vfprintf(file, format, list);
  va_end(list);
  fputc('\n', file);
  fclose(file);
}

static R fails(const char *name) {
  static struct { char name[64]; int calls; } counts[64];
  static char before[128];
  const char *found = getenv("FAKE_FAIL");
  if (strcmp(before, found ? found : "")) {                /* another wish: count anew */
    snprintf(before, sizeof before, "%s", found ? found : "");
    memset(counts, 0, sizeof counts);
  }
  int i = 0;
  while (counts[i].calls && strcmp(counts[i].name, name)) i++;
  snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
  counts[i].calls++;
  char wanted[64];
  int call, code;
  if (found && sscanf(found, "%63[^:]:%d:%d", wanted, &call, &code) == 3 && !strcmp(wanted, name) &&
      call == counts[i].calls)
    return code;
  return started || !strcmp(name, "cuInit") || !strcmp(name, "cuDriverGetVersion") ? OK : UNINIT;
}
#define BEGIN(name) do { R r_ = fails(name); if (r_) return r_; } while (0)
#define IN_CONTEXT do { if (!depth || current[depth - 1] != &context) return BAD_CONTEXT; } while (0)

static Span *find(Span *spans, uintptr_t at, size_t size) {
  for (int i = 0; i < MANY; i++)
    if (spans[i].used && spans[i].start <= at && at + size <= spans[i].start + spans[i].size) return &spans[i];
  return NULL;
}
static Span *room(Span *spans) {
  for (int i = 0; i < MANY; i++) if (!spans[i].used) return &spans[i];
  abort();
}
static int overlaps(Span *spans, uintptr_t at, size_t size) {
  for (int i = 0; i < MANY; i++)
    if (spans[i].used && spans[i].start < at + size && at < spans[i].start + spans[i].size) return 1;
  return 0;
}
static int readable(uintptr_t at, size_t size) {           /* every byte is mapped, with access */
  while (size) {
    Span *span = find(maps, at, 1);
    if (!span || !span->access) return 0;
    size_t part = span->start + span->size - at;
    if (part >= size) return 1;
    at += part, size -= part;
  }
  return 1;
}

R fk_cuInit(unsigned flags) {
  BEGIN("cuInit");
  if (flags) return INVALID;
  if (!started) {
    total = (size_t)setting("FAKE_MEMORY", 64 << 20);
    fd = memfd_create("fake-cuda", 0);
    started = 1;
  }
  return OK;
}
R fk_cuDriverGetVersion(int *version) { BEGIN("cuDriverGetVersion"); *version = setting("FAKE_VERSION", 13000); return OK; }
R fk_cuDeviceGetCount(int *count) { BEGIN("cuDeviceGetCount"); *count = 1; return OK; }
R fk_cuDeviceGet(int *device, int ordinal) { BEGIN("cuDeviceGet"); *device = 0; return ordinal ? BAD_DEVICE : OK; }
R fk_cuDeviceGetAttribute(int *value, int attribute, int device) {
  BEGIN("cuDeviceGetAttribute");
  if (device) return BAD_DEVICE;
  *value = attribute == 102 ? setting("FAKE_VMM", 1) : attribute == 18 ? setting("FAKE_INTEGRATED", 0)
         : attribute == 19 ? 1 : attribute == 110 ? 1 : 0;
  return OK;
}
R fk_cuDevicePrimaryCtxRetain(void **made, int device) { BEGIN("cuDevicePrimaryCtxRetain"); *made = &context; return device ? BAD_DEVICE : OK; }
R fk_cuCtxGetCurrent(void **found) { BEGIN("cuCtxGetCurrent"); *found = depth ? current[depth - 1] : NULL; return OK; }
R fk_cuCtxPushCurrent(void *wanted) {
  BEGIN("cuCtxPushCurrent");
  if (wanted != &context || depth == 16) return BAD_CONTEXT;
  current[depth++] = wanted;
  return OK;
}
R fk_cuCtxPopCurrent(void **found) { BEGIN("cuCtxPopCurrent"); if (!depth) return BAD_CONTEXT; *found = current[--depth]; return OK; }
R fk_cuMemGetInfo(size_t *left, size_t *all) { BEGIN("cuMemGetInfo"); IN_CONTEXT; *left = total - taken; *all = total; return OK; }

static int good(const Prop *prop) {
  return prop->type == 1 && prop->handles == 0 && prop->where.type == 1 && prop->where.id == 0 && prop->flags.rdma == 1;
}
R fk_cuMemGetAllocationGranularity(size_t *grain, const Prop *prop, int option) {
  BEGIN("cuMemGetAllocationGranularity");
  if (!good(prop) || option) return INVALID;
  *grain = GRAIN;
  return OK;
}
R fk_cuMemAddressReserve(U *address, size_t size, size_t alignment, U hint, U flags) {
  BEGIN("cuMemAddressReserve");
  if (!size || size % GRAIN || alignment || hint || flags) return INVALID;
  char *place = mmap(NULL, size + GRAIN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return OOM;
  uintptr_t start = ((uintptr_t)place + GRAIN - 1) / GRAIN * GRAIN;
  *room(ranges) = (Span){start, size, 0, 0, 1};
  *address = start;
  tell("reserve %zu", size);
  return OK;
}
R fk_cuMemAddressFree(U address, size_t size) {
  BEGIN("cuMemAddressFree");
  Span *span = find(ranges, address, size);
  if (!span || span->start != address || span->size != size || overlaps(maps, address, size)) return INVALID;
  span->used = 0;
  tell("free %zu", size);
  return OK;
}
R fk_cuMemCreate(U *handle, size_t size, const Prop *prop, U flags) {
  BEGIN("cuMemCreate");
  if (!good(prop) || flags || !size || size % GRAIN) return INVALID;
  if (size > total - taken) return OOM;
  int i = 1;
  while (chunks[i].used) i++;
  if (ftruncate(fd, end_of_file + (off_t)size)) return OOM;
  chunks[i] = (Chunk){size, end_of_file, 0, 0, 1};
  end_of_file += size, taken += size;
  *handle = (U)i;
  tell("create %zu", size);
  return OK;
}
static void drop(U handle) {
  Chunk *chunk = &chunks[handle];
  if (chunk->released && !chunk->mapped) {
    fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, chunk->at, (off_t)chunk->size);
    taken -= chunk->size, chunk->used = 0;
  }
}
R fk_cuMemMap(U address, size_t size, size_t offset, U handle, U flags) {
  BEGIN("cuMemMap");
  if (handle >= MANY || !chunks[handle].used || chunks[handle].released) return INVALID;
  if (flags || address % GRAIN || size % GRAIN || offset || size != chunks[handle].size) return INVALID;
  Span *range = find(ranges, address, size);
  if (!range || overlaps(maps, address, size)) return INVALID;
  *room(maps) = (Span){address, size, handle, 0, 1};
  chunks[handle].mapped++;
  tell("map %zu at %zu", size, (size_t)(address - range->start));
  return OK;
}
R fk_cuMemSetAccess(U address, size_t size, const Access *wanted, size_t count) {
  BEGIN("cuMemSetAccess");
  Span *span = find(maps, address, size);
  if (!span || count != 1 || wanted->where.type != 1 || wanted->where.id || wanted->flags != 3) return INVALID;
  void *got = mmap((void *)address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, chunks[span->handle].at);
  if (got != (void *)address) return OOM;
  memset(got, 0xFF, size);
  span->access = 1;
  tell("access %zu", size);
  return OK;
}
R fk_cuMemUnmap(U address, size_t size) {
  BEGIN("cuMemUnmap");
  Span *span = find(maps, address, size);
  if (!span || span->start != address || span->size != size) return INVALID;
  mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  span->used = 0;
  chunks[span->handle].mapped--;
  drop(span->handle);
  tell("unmap %zu at %zu", size, (size_t)(address - find(ranges, address, size)->start));
  return OK;
}
R fk_cuMemRelease(U handle) {
  BEGIN("cuMemRelease");
  if (handle >= MANY || !chunks[handle].used || chunks[handle].released) return INVALID;
  chunks[handle].released = 1;
  drop(handle);
  tell("release");
  return OK;
}
R fk_cuMemHostRegister(void *address, size_t size, unsigned flags) {
  BEGIN("cuMemHostRegister");
  IN_CONTEXT;
  if (flags != 3 || !size) return INVALID;
  if (overlaps(pins, (uintptr_t)address, size)) return ALREADY;
  *room(pins) = (Span){(uintptr_t)address, size, 0, 1, 1};
  tell("register %zu", size);
  return OK;
}
R fk_cuMemHostUnregister(void *address) {
  BEGIN("cuMemHostUnregister");
  IN_CONTEXT;
  Span *span = find(pins, (uintptr_t)address, 1);
  if (!span || span->start != (uintptr_t)address) return UNKNOWN_HOST;
  span->used = 0;
  tell("unregister %zu", span->size);
  return OK;
}
R fk_cuMemHostGetDevicePointer(U *found, void *address, unsigned flags) {
  BEGIN("cuMemHostGetDevicePointer");
  IN_CONTEXT;
  if (flags || !find(pins, (uintptr_t)address, 1)) return INVALID;
  *found = (U)(uintptr_t)address;
  return OK;
}
R fk_cuStreamCreate(void **made, unsigned flags) {
  BEGIN("cuStreamCreate");
  IN_CONTEXT;
  if (flags != 1) return INVALID;
  *made = (void *)(uintptr_t)(4096 + ++streams);
  return OK;
}
R fk_cuStreamDestroy(void *stream) { BEGIN("cuStreamDestroy"); tell("destroy %d", (int)((uintptr_t)stream - 4096)); return OK; }
static R copy(const char *name, uintptr_t target, uintptr_t source, size_t size, void *stream, int to_device, int from_device) {
  BEGIN(name);
  IN_CONTEXT;
  if (to_device ? !readable(target, size) : !find(pins, target, size)) return INVALID;
  if (from_device ? !readable(source, size) : !find(pins, source, size)) return INVALID;
  memcpy((void *)target, (void *)source, size);
  tell("%s %zu on %d", name, size, (uintptr_t)stream > 4096 ? (int)((uintptr_t)stream - 4096) : -(int)(uintptr_t)stream);
  return OK;
}
R fk_cuMemcpyHtoDAsync(U target, const void *source, size_t size, void *stream) { return copy("cuMemcpyHtoDAsync", target, (uintptr_t)source, size, stream, 1, 0); }
R fk_cuMemcpyDtoHAsync(void *target, U source, size_t size, void *stream) { return copy("cuMemcpyDtoHAsync", (uintptr_t)target, source, size, stream, 0, 1); }
R fk_cuMemcpyDtoDAsync(U target, U source, size_t size, void *stream) { return copy("cuMemcpyDtoDAsync", target, source, size, stream, 1, 1); }

R cuGetProcAddress_v2(const char *name, void **found, int version, U flags, int *status) {
  char own[128];
  if (!strcmp(name, "cuGetProcAddress")) {
    *found = (void *)cuGetProcAddress_v2;
    return OK;
  }
  snprintf(own, sizeof own, "fk_%s", name);
  *found = dlsym(RTLD_DEFAULT, own);
  if (!*found) {
    Dl_info about;
    dladdr((void *)fk_cuInit, &about);
    void *self = dlopen(about.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *found = self ? dlsym(self, own) : NULL;
  }
  if (status) *status = *found ? 0 : 1;
  return OK; /* as documented: the status says whether it was found */
}
