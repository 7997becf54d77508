// The clock of this core and the most products that its instructions add up in registers: what
// benchmarks/linear_kernels.py compares kernels with.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

namespace {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// The best of some runs of `what`, in seconds.
template <class F>
double best(F what) {
  double least = 1e9;
  for (int i = 0; i < 40; ++i) {
    const double start = now();
    what();
    const double took = now() - start;
    if (took < least) least = took;
  }
  return least;
}

constexpr int64_t ROUNDS = 200000;

// One product waits for another: three clocks each. (Additions of a constant are folded by some CPUs.)
void products() {
  int64_t x = 1, n = ROUNDS;
  __asm__ volatile(
      "1:\n" ".rept 16\n" "imul $3, %0, %0\n" ".endr\n" "dec %1\n" "jnz 1b\n" : "+r"(x), "+r"(n));
}

#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define LOOP(body) \
  int64_t n = ROUNDS; \
  __asm__ volatile("1:\n" body "dec %0\n" "jnz 1b\n" "vzeroupper\n" : "+r"(n)::CLOBBERED)
#define CLOBBERED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

void fma_avx2() {
#define F(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n"
  LOOP(EACH(F));
#undef F
}

void dpbusd512() {
#define F(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n"
  LOOP(EACH(F));
#undef F
}

// Four tiles of sums, two and two that are multiplied, as kernels have them.
void tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  LOOP("tdpbssd %%tmm6, %%tmm4, %%tmm0\n" "tdpbssd %%tmm7, %%tmm4, %%tmm1\n"
       "tdpbssd %%tmm6, %%tmm5, %%tmm2\n" "tdpbssd %%tmm7, %%tmm5, %%tmm3\n");
  __asm__ volatile("tilerelease");
}

void say(const char* what, double seconds, double macs, double clock) {
  std::printf("%s: %.0f GMAC/s in registers, %.1f a clock\n", what, macs / seconds / 1e9,
              macs / seconds / clock);
}

}  // namespace

int main() {
  unsigned a, b, c, d, low, high;
  const double clock = ROUNDS * 16.0 * 3 / best(products);  // the loop's own subtraction runs beside
  std::printf("one core: about %.2f GHz\n", clock / 1e9);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  say("avx2 floats", best(fma_avx2), ROUNDS * 12.0 * 8, clock);
  if ((b >> 16 & 1) && (c >> 11 & 1) && (low & 0xe6) == 0xe6)
    say("avx512vnni bytes", best(dpbusd512), ROUNDS * 12.0 * 64, clock);
  const bool has_tiles = (d >> 24 & 1) && (d >> 25 & 1) && (low & 0x60000) == 0x60000;
  if (has_tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0)
    say("amx bytes", best(tiles), ROUNDS * 4.0 * 16 * 16 * 64, clock);
  return 0;
}
