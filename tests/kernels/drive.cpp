// Runs every path of the kernels on odd shapes and codes and compares the bits with those of the portable one.
//
// Every buffer ends where memory that may not be touched begins: a page without rights, or what
// AddressSanitizer puts there. Compiled with the kernels' own sources, by tests/test_kernel_memory.py.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "attention.h"
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

  int64_t apart() const { return k + 3; }  // the rows of x, which is a part of something wider
};

int failures = 0, compared = 0;

void compare(Exact& p, Exact& x, Exact* bias, Shape s, int32_t before, const char* what) {
  const size_t bytes = size_t(s.rows * s.n) * 4;
  Exact want(bytes);
  auto run = [&](Exact& y, const char* path) {
    std::memset(y.as<uint8_t>(), 0xff, y.bytes());
    return dfc_linear(p.as<uint8_t>(), int64_t(p.bytes()), x.as<float>(), s.apart(), s.rows, s.k,
                      bias ? bias->as<float>() : nullptr, y.as<float>(), s.n, before, 1, path);
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
  Exact x(size_t(s.rows ? (s.rows - 1) * s.apart() + s.k : 0) * 4), bias(with_bias ? size_t(s.n) * 4 : 0);
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
  for (int32_t before : {DFC_NOTHING, DFC_GELU})
    compare(packed, x, with_bias ? &bias : nullptr, s, before, what);
}

// What is not a packed weight is refused, and nothing behind it is read.
void refuses() {
  Exact none(0), some(63), x(64), y(64);
  std::memset(some.as<uint8_t>(), 0, some.bytes());
  if (dfc_linear(none.as<uint8_t>(), 0, x.as<float>(), 16, 1, 16, nullptr, y.as<float>(), 16, 0, 1,
                 nullptr) != DFC_MALFORMED)
    ++failures;
  if (dfc_linear(some.as<uint8_t>(), 63, x.as<float>(), 16, 1, 16, nullptr, y.as<float>(), 16, 0, 1,
                 nullptr) != DFC_MALFORMED)
    ++failures;
}

void norms(int64_t rows, int64_t n) {
  const size_t row = size_t(n) * 4, all = row * size_t(rows);
  Exact x(all), r(all), weight(row), bias(row), want(all), y(all);
  for (Exact* e : {&x, &r, &weight, &bias})
    for (size_t i = 0; i < e->bytes() / 4; ++i) e->as<float>()[i] = number();
  auto run = [&](Exact& to, const char* path) {
    return dfc_add_norm(x.as<float>(), r.as<float>(), weight.as<float>(), bias.as<float>(),
                        to.as<float>(), rows, n, 1e-5f, 1, path);
  };
  if (run(want, "portable") != DFC_DONE) ++failures;
  for (int32_t i = 0; const char* path = dfc_kernels_path(i); ++i) {
    ++compared;
    if (run(y, path) == DFC_DONE && !std::memcmp(y.as<uint8_t>(), want.as<uint8_t>(), all)) continue;
    ++failures;
    std::printf("%s differs: norm of %d rows of %d\n", path, int(rows), int(n));
  }
}

// ---- attention

float as_float(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Heads {
  int64_t batch, heads, shared, rows, keys, depth, width;
};

// Beside doubles: what rounding to bf16 allows, and zeros where a row sees nothing.
void attends(Heads h, uint32_t flags, bool masked) {
  const int64_t groups = h.heads / h.shared, d = h.depth, e = h.width;
  const int64_t q_rows = h.batch * h.heads * h.rows, k_rows = h.batch * groups * h.keys;
  const bool floats = flags & dfc::FLOATS, wide = flags & dfc::FLOATS_OUT;
  auto filled = [&](Exact& x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t half;
      const float value = number() / 8.0f;
      std::memcpy(&half, reinterpret_cast<const uint8_t*>(&value) + 2, 2);  // exact as bf16
      if (floats)
        x.as<float>()[i] = as_float(half);
      else
        x.as<uint16_t>()[i] = half;
    }
  };
  const int64_t size = floats ? 4 : 2;
  Exact q(size_t(q_rows * d * size)), k(size_t(k_rows * d * size)), v(size_t(k_rows * e * size));
  Exact y(size_t(q_rows * e * (wide ? 4 : 2)));
  filled(q, q_rows * d), filled(k, k_rows * d), filled(v, k_rows * e);
  Exact mask(masked ? size_t(h.rows * h.keys * (flags & dfc::ADDED ? 4 : 1)) : 0);
  auto hides = [&](int64_t r, int64_t t) { return r == 1 || (r * 7 + t) % 5 == 0; };
  for (int64_t i = 0; masked && i < h.rows * h.keys; ++i) {
    const bool hidden = hides(i / h.keys, i % h.keys);
    if (flags & dfc::ADDED)
      mask.as<float>()[i] = hidden ? -INFINITY : float(i % 3);
    else
      mask.as<uint8_t>()[i] = uint8_t(!hidden);
  }
  DfcAttention a{};
  a.q = q.as<void>(), a.k = k.as<void>(), a.v = v.as<void>(), a.y = y.as<void>();
  a.mask = masked ? mask.as<void>() : nullptr;
  a.batch = h.batch, a.heads = h.heads, a.shared = h.shared;
  a.rows = h.rows, a.keys = h.keys, a.depth = d, a.width = e;
  auto strides = [](int64_t (&to)[3], int64_t heads, int64_t rows, int64_t row) {
    to[0] = heads * rows * row, to[1] = rows * row, to[2] = row;
  };
  strides(a.q_stride, h.heads, h.rows, d), strides(a.y_stride, h.heads, h.rows, e);
  strides(a.k_stride, groups, h.keys, d), strides(a.v_stride, groups, h.keys, e);
  a.mask_stride[2] = h.keys;
  a.scale = 0.25f, a.flags = flags;
  ++compared;
  if (dfc_attention(&a, 1) != DFC_DONE) ++failures;
  auto at = [&](Exact& x, int64_t i) {
    return double(floats ? x.as<float>()[i] : as_float(x.as<uint16_t>()[i]));
  };
  for (int64_t r = 0; r < q_rows; ++r) {
    const int64_t row = r % h.rows, head = r / h.rows;
    const int64_t first = (head / h.heads * groups + head % h.heads / h.shared) * h.keys;
    double sum = 0.0, want[dfc::LARGEST_HEAD] = {}, most = 0.0;
    for (int64_t t = 0; t < h.keys; ++t) {
      if ((masked && hides(row, t)) || (flags & dfc::CAUSAL && t > row)) continue;
      double score = 0.0;
      for (int64_t i = 0; i < d; ++i) score += at(q, r * d + i) * at(k, (first + t) * d + i) * 0.25;
      if (masked && flags & dfc::ADDED) score += double((row * h.keys + t) % 3);
      const double weight = std::exp(score);
      sum += weight;
      for (int64_t i = 0; i < e; ++i) want[i] += weight * at(v, (first + t) * e + i);
    }
    for (int64_t t = 0; t < h.keys * e; ++t) most = std::fmax(most, std::fabs(at(v, first * e + t)));
    for (int64_t i = 0; i < e; ++i) {
      const double got = double(wide ? y.as<float>()[r * e + i] : as_float(y.as<uint16_t>()[r * e + i]));
      const double expected = sum == 0.0 ? 0.0 : want[i] / sum;
      if (std::fabs(got - expected) <= (sum == 0.0 ? 0.0 : most / 128.0)) continue;
      std::printf("attention differs: %g, not %g; rows %d, keys %d, depth %d, width %d, flags %u\n",
                  got, expected, int(h.rows), int(h.keys), int(d), int(e), flags);
      ++failures;
      return;
    }
  }
}

void attention() {
  const Heads all[] = {{1, 2, 1, 5, 7, 16, 16},  {2, 2, 2, 14, 33, 8, 24}, {1, 1, 1, 1, 1, 1, 1},
                       {1, 2, 1, 3, 130, 40, 9}, {1, 1, 1, 25, 65, 64, 80}, {1, 1, 1, 135, 3, 4, 4},
                       {1, 3, 3, 2, 5, 256, 256}};
  for (const Heads& h : all)
    for (uint32_t flags = 0; flags < 8; ++flags) attends(h, flags, false);
  for (const Heads& h : all)
    for (uint32_t flags : {0u, dfc::FLOATS | dfc::FLOATS_OUT, dfc::ADDED | dfc::FLOATS})
      attends(h, flags, true);
  for (const Heads& h : {Heads{0, 1, 1, 4, 4, 4, 4}, Heads{1, 1, 1, 0, 4, 4, 4}, Heads{1, 1, 1, 4, 0, 4, 4}})
    attends(h, 0, false);
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
  for (int64_t n : {1, 7, 8, 33, 64, 95})
    for (int64_t rows : {0, 1, 5}) norms(rows, n);
  refuses();
  if (dfc_attends()) attention();
  std::printf("paths:");
  for (int32_t i = 0; const char* path = dfc_kernels_path(i); ++i) std::printf(" %s", path);
  std::printf("\ncompared: %d\nfailures: %d\n", compared, failures);
  return failures != 0;
}
