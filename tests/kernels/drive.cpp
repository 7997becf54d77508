// Runs every path of the kernels on odd shapes and codes and compares the bits with those of the portable one.
//
// Every buffer ends where memory that may not be touched begins: a page without rights, or what
// AddressSanitizer puts there. Compiled with the kernels' own sources, by tests/test_kernels.py.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }
float number() { return (float(next() % 20001) - 10000.0f) / 977.0f; }

// Memory of exactly this size, with no more behind it.
class Exact {
 public:
  explicit Exact(size_t bytes) : bytes_(bytes) {
#if defined(__SANITIZE_ADDRESS__)
    data_ = static_cast<uint8_t*>(std::malloc(bytes ? bytes : 1));
#else
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page + 1;
    length_ = pages * page;
    void* base = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) std::abort();
    base_ = static_cast<uint8_t*>(base);
    if (mprotect(base_ + length_ - page, page, PROT_NONE)) std::abort();
    data_ = base_ + length_ - page - bytes;
#endif
  }
  ~Exact() {
#if defined(__SANITIZE_ADDRESS__)
    std::free(data_);
#else
    munmap(base_, length_);
#endif
  }
  Exact(const Exact&) = delete;
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t *data_ = nullptr, *base_ = nullptr;
  size_t bytes_, length_ = 0;
};

struct Shape {
  int64_t rows, n, k;
};

int failures = 0, compared = 0;

void compare(Exact& p, Exact& x, Exact* bias, Shape s, const char* what) {
  const size_t bytes = size_t(s.rows * s.n) * 4;
  Exact want(bytes);
  auto run = [&](Exact& y, const char* path) {
    std::memset(y.as<uint8_t>(), 0xff, y.bytes());
    return dfc_linear(p.as<uint8_t>(), int64_t(p.bytes()), x.as<float>(), s.rows, s.k,
                      bias ? bias->as<float>() : nullptr, y.as<float>(), s.n, 1, path);
  };
  if (run(want, "portable") != DFC_DONE) ++failures;
  for (int32_t i = 0; const char* path = dfc_kernels_path(i); ++i) {
    Exact y(bytes);
    const bool same = run(y, path) == DFC_DONE &&
                      !std::memcmp(y.as<uint8_t>(), want.as<uint8_t>(), bytes);
    ++compared;
    if (same) continue;
    ++failures;
    std::printf("%s differs: %s, %d rows, n %d, k %d\n", path, what, int(s.rows), int(s.n),
                int(s.k));
  }
}

// Codes of any value, or most of them small, or only the largest of one sign.
enum Codes { ANY, SMALL, LARGEST };

uint8_t code(Codes kind) {
  const int32_t any = int32_t(next() % 256);
  if (kind == LARGEST) return any < 10 ? 127 : 128;
  const int32_t small = (any - 128) * int32_t(next() % 256) * int32_t(next() % 256) / 65536;
  return uint8_t(kind == SMALL ? small : any);
}

void one(int bits, int64_t group, uint32_t flags, bool with_bias, Shape s, Codes kind = ANY) {
  const int64_t width = group ? group : (s.k + 31) / 32 * 32, groups = (s.k + width - 1) / width;
  const int64_t row = bits == 8 ? s.k : groups * width / 2;
  Exact codes(size_t(s.n * row)), scale(size_t(s.n * groups) * 4);
  for (size_t i = 0; i < codes.bytes(); ++i) codes.as<uint8_t>()[i] = code(kind);
  const int64_t lane = flags & dfc::LANES_OF_2 ? 2 : flags & dfc::LANES_OF_4 ? 4 : 0;
  const int64_t fixes = lane ? dfc::count_fixes(codes.as<int8_t>(), s.n, s.k, lane).most : 0;
  const int64_t size = dfc_packed_bytes(bits, s.n, s.k, group, flags, fixes);
  Exact zeros(flags & 2 ? size_t(s.n * ((groups + 1) / 2)) : 0), packed{size_t(size)};
  Exact x(size_t(s.rows * s.k) * 4), bias(with_bias ? size_t(s.n) * 4 : 0);
  for (size_t i = 0; i < zeros.bytes(); ++i) zeros.as<uint8_t>()[i] = uint8_t(next());
  for (size_t i = 0; i < scale.bytes() / 4; ++i)  // 11 bits: exact as f16
    scale.as<float>()[i] = float(next() % 2048) / 1024.0f;
  for (size_t i = 0; i < x.bytes() / 4; ++i) x.as<float>()[i] = number();
  for (size_t i = 0; i < bias.bytes() / 4; ++i) bias.as<float>()[i] = number();
  const uint8_t* z = flags & 2 ? zeros.as<uint8_t>() : nullptr;
  if (dfc_pack(bits, s.n, s.k, group, flags, fixes, codes.as<uint8_t>(), scale.as<float>(), z,
               packed.as<uint8_t>(), size, 1) != DFC_DONE)
    ++failures;
  if (dfc_packed_check(packed.as<uint8_t>(), size, bits, s.n, s.k, group) != DFC_DONE) ++failures;
  char what[80];
  std::snprintf(what, sizeof what, "int%d, group %d, flags %u", bits, int(group), flags);
  compare(packed, x, with_bias ? &bias : nullptr, s, what);
}

// What is not a packed weight is refused, and nothing behind it is read.
void refuses() {
  Exact none(0), some(63), x(64), y(64);
  std::memset(some.as<uint8_t>(), 0, some.bytes());
  if (dfc_linear(none.as<uint8_t>(), 0, x.as<float>(), 1, 16, nullptr, y.as<float>(), 16, 1,
                 nullptr) != DFC_MALFORMED)
    ++failures;
  if (dfc_linear(some.as<uint8_t>(), 63, x.as<float>(), 1, 16, nullptr, y.as<float>(), 16, 1,
                 nullptr) != DFC_MALFORMED)
    ++failures;
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 16, 128}, {1, 5, 40},   {1, 1, 1},    {2, 1, 7},   {3, 33, 200},
                          {9, 20, 160}, {4, 16, 640}, {1, 17, 672}, {5, 31, 96}, {131, 18, 64},
                          {0, 16, 32},  {3, 0, 32},   {13, 7, 1100},
                          {49, 49, 1100}, {24, 32, 96}};
  for (const Shape& s : shapes) {
    for (int64_t group : {16, 32, 64, 128, 1024})
      for (uint32_t flags = 0; flags < 4; ++flags) one(4, group, flags, flags % 3 == 0, s);
    for (int64_t group : {0, 16, 32, 128, 1024})
      for (uint32_t flags = 0; flags < 2; ++flags) one(8, group, flags, flags == 0, s);
  }
  const Shape many[] = {{32, 16, 32},  {33, 5, 40},    {63, 17, 96},  {65, 16, 1},
                        {131, 18, 64}, {40, 33, 1100}, {34, 3, 2050}, {259, 2, 9}};
  for (const Shape& s : many)
    for (uint32_t lanes : {dfc::LANES_OF_2, dfc::LANES_OF_4})
      for (Codes kind : {ANY, SMALL, LARGEST}) one(8, 0, lanes | (s.k & 1), s.n % 2, s, kind);
  refuses();
  std::printf("paths:");
  for (int32_t i = 0; const char* path = dfc_kernels_path(i); ++i) std::printf(" %s", path);
  std::printf("\ncompared: %d\nfailures: %d\n", compared, failures);
  return failures != 0;
}
