// Linear layers with packed int4 or int8 weights and int8 activations: what the files here share.
//
// A weight is packed once, into one buffer that says by itself what it holds:
//
//   header                  64 bytes: Header, zero-filled
//   panel 0, 1, ...         16 outputs each; every part of a panel starts at a multiple of 64 bytes
//     scales [groups][16]   f16 where that is exact for the whole weight, else f32
//     zeros  [groups][16]   u8, only of asymmetric int4 weights
//     codes  [steps][64]    a step is 8 values of K (int4) or 4 values of K (int8), byte 4*o + i
//                           is output o: int4 has k = 8*step + i in the low nibble and 4 more in
//                           the high one, with offset 8 or the group's zero; int8 has k = 4*step + i
//   fixes of panel 0, 1, ...  only of int8 weights whose lanes nearly fit (see Fixes)
//
// Fixes are for many rows only. Between panels they would be holes in what one row reads, and a CPU
// that reads ahead by itself stops at each: 16 instead of 25 GB/s on one core were measured.
//
// Outputs beyond N have scale 0; values beyond K meet activations that are 0. So 64 bytes feed 16
// outputs at once on AVX-512, 32 feed 8 on AVX2, and no kernel reads outside of the buffer.
//
// Every path gives the same bits: integers are exact, and for each output, groups are added in
// order, sum = fma(float(dot) * x_scale, weight_scale, sum), whatever the path and the threads.
#pragma once

#include <cstddef>
#include <cstdint>

// Compilers before these do not know AMX: the path is left out.
#if defined(DFC_SIMDE)
#define DFC_AMX
#elif defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define DFC_AMX
#endif
#endif

namespace dfc {

constexpr int64_t PANEL = 16;
constexpr int64_t FLUSH = 32;  // so many products of int4 and int8 fit int16: 16 * 15 * 127 < 2^15
constexpr uint32_t MAGIC = 0x4c636664;  // "dfcL"
constexpr uint32_t VERSION = 4;

// All ints are little-endian, as everywhere that these kernels run.
struct Header {
  uint32_t magic, version;
  uint32_t bits;         // 4 or 8
  uint32_t flags;        // HALF_SCALES, ZEROS, LANES_OF_2, LANES_OF_4
  int64_t n, k, group;   // group: values that share a scale; k padded to 32 when it is one group
  int64_t fixes;         // of a panel, at most
  uint64_t bytes;        // of the whole buffer
};
static_assert(sizeof(Header) == 56, "the header is read from files");
constexpr int64_t HEADER_BYTES = 64;
constexpr uint32_t HALF_SCALES = 1, ZEROS = 2, LANES_OF_2 = 4, LANES_OF_4 = 8;

// Many rows of int8, without instructions that add four products in 32 bits: a product of bytes
// x + 128 and codes, of 2 or 4 values of K, fits a lane of int16 where codes of one sign add up to
// 128 at most. That holds for nearly all; what some have too much is multiplied by itself, and what
// the 128 adds is taken away. So every sum is exact.
constexpr int64_t LANE_SUM = 128;     // 255 * 128 < 2^15
constexpr int64_t LEAST_LANE_ROWS = 32;  // fewer are multiplied as int16: fixes take 64 at once

constexpr int64_t LANE_BLOCK = 1024;  // values of K whose codes are half of the first cache

// Four codes of an output and a block of K that have too much: their products are added in int16 as
// well. What is not needed is the block's first by 0.
struct Fix {
  uint16_t k[4];
  int8_t by[4];
};

// The beginning of a panel's fixes.
struct Fixes {
  int32_t offset[PANEL];     // 128 times the sum of the output's codes
  int32_t begin[PANEL + 1];  // of the output's fixes
  int32_t filling[15];
};
static_assert(sizeof(Fixes) == 192, "it is read from files");

// Where things are in a panel; all in bytes from its start.
struct Layout {
  int bits;
  bool half_scales, has_zeros;
  int64_t n, k, group, groups, padded_k, panels;
  int64_t lane;          // values of K that are added in int16, 0 where that does not fit
  int64_t fixes;         // of a panel, at most
  int64_t zeros_at, codes_at, panel_bytes, bytes;
  int64_t fixes_at, fixes_bytes;  // of all panels, from the first panel on; and of each
  int64_t group_bytes;   // of a group's codes
  int64_t stride_bytes;  // of a group with its scales, about
};

// Rows quantized to int8, per group: x = q * scale, and sum is that of the group's q.
struct Rows {
  int64_t stride;        // from row to row of q
  const int8_t* q;       // [rows][padded_k]; x + 128 where the path or columns want that
  const int16_t* wide;   // the same, where the path wants it, else null
  const uint8_t* columns;  // [tiles][padded_k][TILE_ROWS], 128 more, for lanes; then so is q
  const float* scale;    // [rows][groups]
  const int32_t* sum;    // [rows][groups]
};

struct Job {
  Layout w;
  const uint8_t* panels;
  Rows x;
  const float* bias;  // or null
  float* y;           // [rows][n]
  int64_t rows;
  int64_t tile_rows;  // of each tile but the last
};

// How many rows and panels a tile has at most: their sums stay in the first cache.
constexpr int64_t TILE_ROWS = 128;
constexpr int64_t TILE_PANELS = 2;
constexpr int64_t TURNED_ROWS = 16;  // a tile has a multiple of them
constexpr int64_t TILE_K = 512;  // values of K that a tile unpacks at a time

// What a thread needs for a tile.
struct Tiling {
  alignas(64) uint8_t codes[TILE_K * PANEL * 2];  // unpacked
  alignas(64) float scales[TILE_K / 16 * PANEL * TILE_PANELS];
  alignas(64) int32_t zeros[TILE_K / 16 * PANEL * TILE_PANELS];
  alignas(64) float total[TILE_ROWS * PANEL * TILE_PANELS];
  alignas(64) int32_t dots[TILE_K / 16 * 4 * PANEL];      // of 4 rows: [parts][4][16]
  alignas(64) int32_t unfinished[TILE_ROWS * PANEL * TILE_PANELS];  // of a group that goes on
};

// What is multiplied at once: some whole groups, or a part of one that is longer.
struct Stretch {
  int64_t group, groups;  // which, and how many
  int64_t begin, count;   // values of K: where, and how many of each group
  bool first, last;       // of a group
};

// Rows of n: y is the layer norm of x + r, or of x where r is null.
struct Norm {
  const float *x, *r, *weight, *bias;
  float* y;
  int64_t n;
  float eps;
};

// One way to compute, for a kind of CPU.
struct Path {
  const char* name;
  bool wants_wide;   // for many rows of int8 weights
  // From how many rows on of int8 with one scale an output x + 128 is wanted, as u8; or 0.
  int64_t byte_rows;
  int64_t panels;    // of a tile
  // Fewer rows and shorter groups are left to another path, if there is one.
  int64_t least_rows, least_group;
  const Path* other;
  // Writes columns of at most TURNED_ROWS rows; null where the path has no use for lanes.
  void (*turn)(const Job& job, int64_t row, int64_t rows, uint8_t* columns);
  // One row of k floats to int8: q, a scale and a sum for each group. `add` is 128 where q is to be
  // x + 128, else 0.
  void (*quantize)(const float* x, const Layout& w, int add, int8_t* q, float* scale, int32_t* sum);
  // x times the normal distribution's share below x, of k floats.
  void (*gelu)(const float* x, int64_t k, float* y);
  void (*norm)(const Norm& job, int64_t row);
  // One panel for one row.
  void (*one_row)(const Job& job, int64_t panel);
  // Some panels, at most those of a tile, for some rows, at most TILE_ROWS.
  void (*many_rows)(const Job& job, int64_t panel, int64_t panels, int64_t row, int64_t rows,
                    Tiling& scratch);
};

extern const Path portable_path;
#if defined(__x86_64__) || defined(DFC_SIMDE)
extern const Path avx2_path;
extern const Path avx512vnni_path, avx512vnni_zen_path;
#if defined(DFC_AMX)
extern const Path amx_path;
#endif
// One row of weights with groups, as Zen reads them best.
void groups_zen(const Job& job, int64_t panel);
// What is done to a row before it is multiplied, for all of them.
void quantize_avx2(const float* x, const Layout& w, int add, int8_t* q, float* scale, int32_t* sum);
void gelu_avx2(const float* x, int64_t k, float* y);
void quantize_avx512(const float* x, const Layout& w, int add, int8_t* q, float* scale, int32_t* sum);
void gelu_avx512(const float* x, int64_t k, float* y);
void norm_avx2(const Norm& job, int64_t row);
// lanes.cpp: what avx2_path does where rows came as columns too.
void turn_avx2(const Job& job, int64_t row, int64_t rows, uint8_t* columns);
void lanes_avx2(const Job& job, int64_t panel, int64_t row, int64_t rows, Tiling& scratch);
#endif

// fixes.cpp: packing. The most fixes of a panel and all of them, for lanes of `lane` values.
struct Counts {
  int64_t most, all;
};
Counts count_fixes(const int8_t* codes, int64_t n, int64_t k, int64_t lane);
// The fixes of panel `index`, to its place for them.
void write_fixes(const int8_t* codes, const Layout& w, int64_t index, uint8_t* to);
// Whether what was read from a file names no place outside of the panel.
bool are_fixes(const Layout& w, const uint8_t* from);

// Nothing here may be a plain inline function: the linker would keep one copy, perhaps the one that
// was compiled for the widest CPU.
static inline const uint8_t* panel_of(const Job& job, int64_t panel) {
  return job.panels + panel * job.w.panel_bytes;
}

static inline const Fixes* fixes_of(const Job& job, int64_t panel) {
  const uint8_t* at = job.panels + job.w.fixes_at + panel * job.w.fixes_bytes;
  return reinterpret_cast<const Fixes*>(at);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Where a scale's inverse and remainders of divisions by it are normal numbers. There a quotient takes
// half the time of a division, to the same bits: x times the inverse is off by 1.5 units in the last
// place, a correction makes it one of the two next to x / s, and another, of a remainder that is
// exact then, the nearest.
// Source: Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990.
static inline bool is_quick(float s) { return s > 1e-30f && s < 1e30f; }

// The share below x is 1/2 + x p(2 x^2 / 5.5^2 - 1) up to 5.5, where it is 1 to 2e-8; p's highest power
// comes first. What comes of it is off by 4e-7, and by as much again that 32 bits round.
constexpr float GELU_END = 5.5f, GELU_STRETCH = 2.0f / (5.5f * 5.5f);
constexpr int GELU_COUNT = 14;
constexpr float GELU[GELU_COUNT] = {
    -0.000911749317f, 0.00259226514f, -0.0025182066f, 0.00247533736f, -0.00629272079f,
    0.0114252819f,    -0.0153732533f, 0.0200295448f,  -0.0259418972f, 0.0321135931f,
    -0.038804695f,    0.0477356054f,  -0.0641719773f, 0.128551945f};

// Bytes of a weight that are asked for before they are needed: by one row, which waits for memory
// and has it brought to the second cache, and by many, to the first. Measured on AVX2; a path may
// say its own. What benchmarks/linear_kernels.py --ahead compiles compares others, and none (0).
#if !defined(DFC_AHEAD)
#define DFC_AHEAD 16384
#endif
#if !defined(DFC_CACHE)
#define DFC_CACHE 2  // 3: the first cache, 2: the second
#endif
constexpr int64_t AHEAD = DFC_AHEAD, NEAR_AHEAD = 4096;

static inline void fetch(const uint8_t* at) {
  if (AHEAD > 0) __builtin_prefetch(at, 0, DFC_CACHE);
}

// What to ask for when a group begins: as far ahead in the panel, scales included, or in the next
// one. Why: a fixed distance from the codes leaves out as many of the next panel as it has scales.
// The scales of long rows take more than the distance: then it is half of it ahead of the codes.
static inline const uint8_t* ahead_of(const uint8_t* panel, const Layout& w, int64_t distance) {
  return panel + most(distance, w.codes_at + distance / 2);
}

// How many values of K to unpack next: whole groups, or as much of one as fits.
static inline int64_t next_block(const Layout& w, int64_t k) {
  if (w.group > TILE_K) return least(TILE_K, w.group - k % w.group);
  return least(TILE_K / w.group * w.group, w.padded_k - k);
}

// The next `count` values of K: whole groups, or a part of one.
static inline Stretch stretch_of(const Layout& w, int64_t k, int64_t count) {
  const int64_t g = k / w.group;
  if (count >= w.group) return {g, count / w.group, k, w.group, true, true};
  return {g, 1, k, count, k == g * w.group, k + count == (g + 1) * w.group};
}

}  // namespace dfc

// The C interface. Nothing throws; a status other than 0 says why nothing was done.
extern "C" {

enum { DFC_NOTHING = 0, DFC_GELU = 1 };
enum { DFC_DONE = 0, DFC_MALFORMED = 1, DFC_NO_MEMORY = 2, DFC_NO_SUCH_PATH = 3 };

// Changes when a caller must.
int32_t dfc_kernels_version(void);
// The name of the i-th path that this CPU can run, best first; null after the last.
const char* dfc_kernels_path(int32_t i);
// GOMP_parallel of the OpenMP library that is in the process already, or null for one thread.
// Why: a pool of our own, or a second OpenMP library, would fight with PyTorch's for the cores.
void dfc_kernels_use_openmp(void* gomp_parallel);

// How int8 codes with one scale an output are best multiplied here: a flag LANES_OF_2 or LANES_OF_4
// and how many fixes a panel has at most, or 0 and 0. codes: i8[n][k].
uint32_t dfc_lanes(int64_t n, int64_t k, const int8_t* codes, int64_t* fixes);
// Bytes of a packed weight; -1 for what cannot be packed. group 0: one scale for a whole output.
// fixes: of dfc_lanes, whose flag is among the flags; else 0.
int64_t dfc_packed_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, uint32_t flags,
                         int64_t fixes);
// bits 4: codes u8[n][groups * group / 2], two values a byte, low first, zeros u8[n][(groups + 1) / 2]
// packed likewise, or null for 8. bits 8: codes i8[n][k], zeros null. scale: f32[n][groups].
int32_t dfc_pack(int32_t bits, int64_t n, int64_t k, int64_t group, uint32_t flags, int64_t fixes,
                 const void* codes, const float* scale, const uint8_t* zeros, uint8_t* packed,
                 int64_t bytes, int32_t threads);
// y[rows][n] = x[rows][k] times the weight, plus bias[n] if any. apart: floats from row to row of x,
// at least k. before: DFC_NOTHING, or DFC_GELU of x. path: null for the best.
int32_t dfc_linear(const uint8_t* packed, int64_t bytes, const float* x, int64_t apart, int64_t rows,
                   int64_t k, const float* bias, float* y, int64_t n, int32_t before,
                   int32_t threads, const char* path);
// y[rows][n], the layer norm of x + r, or of x where r is null, times weight[n], plus bias[n].
int32_t dfc_add_norm(const float* x, const float* r, const float* weight, const float* bias, float* y,
                     int64_t rows, int64_t n, float eps, int32_t threads, const char* path);
// Whether a buffer is a packed weight of this shape, with nothing in it that dfc_linear would follow
// to a place outside.
int32_t dfc_packed_check(const uint8_t* packed, int64_t bytes, int32_t bits, int64_t n, int64_t k,
                         int64_t group);
}
