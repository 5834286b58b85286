// Keeps the addon and the CUDA library loadable on glibc 2.28, the oldest that Node itself supports, whatever glibc
// they are built on. A linker takes the newest version of a symbol, although an older one would do as well;
// CMakeLists.txt sends those that matter here (--wrap), where that is glibc on x86-64. scripts/prepack.js checks the
// result.
//
// Each is a jump, whatever its arguments are, in a section of its own: what a library does not use is left out of it.
// clang-format off
#define OLD(name, old, version)                                   \
  __asm__(".symver old_" #name ", " #old "@GLIBC_" version "\n"   \
          ".section .text.__wrap_" #name ", \"ax\", @progbits\n"  \
          ".globl __wrap_" #name "\n"                             \
          ".hidden __wrap_" #name "\n"                            \
          ".type __wrap_" #name ", @function\n"                   \
          "__wrap_" #name ": jmp *old_" #name "@GOTPCREL(%rip)\n" \
          ".size __wrap_" #name ", .-__wrap_" #name "\n"          \
          ".previous");
// clang-format on

// New in 2.32. libstdc++ reads it to do without atomics in a process of one thread, which Node never is.
extern "C" {
char __libc_single_threaded = 0;
}

// 2.29 dropped the error handling of SVID; the values are the same.
OLD(log, log, "2.2.5")
// 2.38 reads "0b1" too, under a name of its own. libstdc++ reads a tunable of its exception pool with it.
OLD(__isoc23_strtoul, strtoul, "2.2.5")

// 2.34 moved these from libdl, libpthread and librt to libc. Before, Node brings along the first two.
OLD(dladdr, dladdr, "2.2.5")
OLD(dlclose, dlclose, "2.2.5")
OLD(dlerror, dlerror, "2.2.5")
OLD(dlmopen, dlmopen, "2.3.4")
OLD(dlopen, dlopen, "2.2.5")
OLD(dlsym, dlsym, "2.2.5")
OLD(dlvsym, dlvsym, "2.2.5")
OLD(__pthread_key_create, __pthread_key_create, "2.2.5")
OLD(pthread_condattr_setpshared, pthread_condattr_setpshared, "2.2.5")
OLD(pthread_create, pthread_create, "2.2.5")
OLD(pthread_detach, pthread_detach, "2.2.5")
OLD(pthread_getspecific, pthread_getspecific, "2.2.5")
OLD(pthread_join, pthread_join, "2.2.5")
OLD(pthread_key_create, pthread_key_create, "2.2.5")
OLD(pthread_key_delete, pthread_key_delete, "2.2.5")
OLD(pthread_kill, pthread_kill, "2.2.5")
OLD(pthread_mutex_trylock, pthread_mutex_trylock, "2.2.5")
OLD(pthread_mutexattr_destroy, pthread_mutexattr_destroy, "2.2.5")
OLD(pthread_mutexattr_init, pthread_mutexattr_init, "2.2.5")
OLD(pthread_mutexattr_setpshared, pthread_mutexattr_setpshared, "2.2.5")
OLD(pthread_mutexattr_settype, pthread_mutexattr_settype, "2.2.5")
OLD(pthread_once, pthread_once, "2.2.5")
OLD(pthread_rwlock_destroy, pthread_rwlock_destroy, "2.2.5")
OLD(pthread_rwlock_init, pthread_rwlock_init, "2.2.5")
OLD(pthread_rwlock_rdlock, pthread_rwlock_rdlock, "2.2.5")
OLD(pthread_rwlock_timedrdlock, pthread_rwlock_timedrdlock, "2.2.5")
OLD(pthread_rwlock_timedwrlock, pthread_rwlock_timedwrlock, "2.2.5")
OLD(pthread_rwlock_tryrdlock, pthread_rwlock_tryrdlock, "2.2.5")
OLD(pthread_rwlock_trywrlock, pthread_rwlock_trywrlock, "2.2.5")
OLD(pthread_rwlock_unlock, pthread_rwlock_unlock, "2.2.5")
OLD(pthread_rwlock_wrlock, pthread_rwlock_wrlock, "2.2.5")
OLD(pthread_rwlockattr_destroy, pthread_rwlockattr_destroy, "2.2.5")
OLD(pthread_rwlockattr_init, pthread_rwlockattr_init, "2.2.5")
OLD(pthread_rwlockattr_setpshared, pthread_rwlockattr_setpshared, "2.2.5")
OLD(pthread_setspecific, pthread_setspecific, "2.2.5")
OLD(pthread_spin_destroy, pthread_spin_destroy, "2.2.5")
OLD(pthread_spin_init, pthread_spin_init, "2.2.5")
OLD(pthread_spin_lock, pthread_spin_lock, "2.2.5")
OLD(pthread_spin_trylock, pthread_spin_trylock, "2.2.5")
OLD(pthread_spin_unlock, pthread_spin_unlock, "2.2.5")
OLD(sem_destroy, sem_destroy, "2.2.5")
OLD(sem_init, sem_init, "2.2.5")
OLD(sem_post, sem_post, "2.2.5")
OLD(sem_timedwait, sem_timedwait, "2.2.5")
OLD(sem_trywait, sem_trywait, "2.2.5")
OLD(sem_wait, sem_wait, "2.2.5")
OLD(shm_open, shm_open, "2.2.5")
OLD(shm_unlink, shm_unlink, "2.2.5")
