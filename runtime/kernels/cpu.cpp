// Asks the CPU and the system what kernels may use.
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(DFC_AMX) && !defined(DFC_SIMDE)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dfc {
namespace {

#if defined(__x86_64__)
// Asks the system for the registers of AMX, which a process has only then. It may refuse.
bool may_use_tiles() {
#if defined(DFC_AMX) && !defined(DFC_SIMDE)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

// The CPU's word, and the system's that it saves the wide registers.
Features look() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return found;
  found.amd = c == 0x444d4163;  // the end of "AuthenticAMD"
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!(fma && osxsave && avx && f16c)) return found;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned leaves = a;
  found.avx2 = b >> 5 & 1;
  const bool f = b >> 16 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  found.avx512vnni = found.avx2 && f && bw && vl && vnni && (low & 0xe6) == 0xe6;
  const bool tile = d >> 24 & 1, int8 = d >> 25 & 1, saved = (low & 0x60000) == 0x60000;
  found.amx = found.avx512vnni && tile && int8 && saved && may_use_tiles();
  if (found.avx512vnni && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    found.avx512bf16 = a >> 5 & 1;
  return found;
}
#else
Features look() { return {}; }
#endif

}  // namespace

const Features& features() {
  static const Features found = look();
  return found;
}

}  // namespace dfc
