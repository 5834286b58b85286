// Keeps the addon loadable on glibc 2.28, the oldest that Node itself supports, whatever glibc it is built on. A linker
// takes the newest version of a symbol, although an older one would do as well; CMakeLists.txt sends those that matter
// here (--wrap), where that is glibc on x86-64. scripts/prepack.js checks the result.
#include <pthread.h>

extern "C" {

// New in 2.32. libstdc++ reads it to do without atomics in a process of one thread, which Node never is.
char __libc_single_threaded = 0;

// 2.34 moved these from libpthread and libdl to libc. Before, Node brings those along.
int old_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int old_pthread_join(pthread_t, void**);
void* old_dlopen(const char*, int);
void* old_dlsym(void*, const char*);
int old_dlclose(void*);
char* old_dlerror(void);
int old_dladdr(const void*, void*);
// 2.29 dropped the error handling of SVID; the values are the same.
double old_log(double);
// 2.38 reads "0b1" too, under a name of its own. libstdc++ reads a tunable of its exception pool with it.
unsigned long old_strtoul(const char*, char**, int);

__asm__(".symver old_pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver old_pthread_join, pthread_join@GLIBC_2.2.5");
__asm__(".symver old_dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver old_dlclose, dlclose@GLIBC_2.2.5");
__asm__(".symver old_dlerror, dlerror@GLIBC_2.2.5");
__asm__(".symver old_dladdr, dladdr@GLIBC_2.2.5");
__asm__(".symver old_log, log@GLIBC_2.2.5");
__asm__(".symver old_strtoul, strtoul@GLIBC_2.2.5");

int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  return old_pthread_create(thread, attributes, start, argument);
}
int __wrap_pthread_join(pthread_t thread, void** result) { return old_pthread_join(thread, result); }
void* __wrap_dlopen(const char* file, int flags) { return old_dlopen(file, flags); }
void* __wrap_dlsym(void* library, const char* name) { return old_dlsym(library, name); }
int __wrap_dlclose(void* library) { return old_dlclose(library); }
char* __wrap_dlerror(void) { return old_dlerror(); }
int __wrap_dladdr(const void* address, void* info) { return old_dladdr(address, info); }
double __wrap_log(double x) { return old_log(x); }
unsigned long __wrap___isoc23_strtoul(const char* text, char** end, int base) { return old_strtoul(text, end, base); }

}  // extern "C"
