// What the static CUDA runtime asks of glibc 2.34, where these moved from libpthread, libdl and librt into libc, is
// here instead and goes on to the same functions under their first version: the library loads from glibc 2.28 on, like
// torch.
#include <features.h>

#if defined(__x86_64__) && defined(__GLIBC__)

#define FIRST(name, version)                                    \
  __asm__(".symver first_" #name ", " #name "@GLIBC_" #version "\n" \
          ".globl " #name "\n.hidden " #name "\n.type " #name ", @function\n" #name ": jmp *first_" #name \
          "@GOTPCREL(%rip)\n");
#define ONE(name) FIRST(name, 2.2.5)

ONE(dlopen) ONE(dlsym) ONE(dlclose) ONE(dlerror) ONE(dlvsym) FIRST(dlmopen, 2.3.4)
ONE(pthread_create) ONE(pthread_join) ONE(pthread_detach) ONE(pthread_once) ONE(pthread_kill)
ONE(pthread_key_create) ONE(pthread_key_delete) ONE(pthread_getspecific) ONE(pthread_setspecific)
ONE(pthread_mutex_trylock) ONE(pthread_mutexattr_init) ONE(pthread_mutexattr_destroy)
ONE(pthread_mutexattr_settype) ONE(pthread_mutexattr_setpshared) ONE(pthread_condattr_setpshared)
ONE(pthread_spin_init) ONE(pthread_spin_destroy) ONE(pthread_spin_lock) ONE(pthread_spin_trylock)
ONE(pthread_spin_unlock) ONE(pthread_rwlock_init) ONE(pthread_rwlock_destroy) ONE(pthread_rwlock_rdlock)
ONE(pthread_rwlock_tryrdlock) ONE(pthread_rwlock_timedrdlock) ONE(pthread_rwlock_wrlock)
ONE(pthread_rwlock_trywrlock) ONE(pthread_rwlock_timedwrlock) ONE(pthread_rwlock_unlock)
ONE(pthread_rwlockattr_init) ONE(pthread_rwlockattr_destroy) ONE(pthread_rwlockattr_setpshared)
ONE(sem_init) ONE(sem_destroy) ONE(sem_post) ONE(sem_wait) ONE(sem_trywait) ONE(sem_timedwait)
ONE(shm_open) ONE(shm_unlink)

#endif
