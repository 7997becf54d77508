// The C interface of linear layers: which path a CPU takes, packing, and work split over threads.
#include <atomic>
#include <cstring>

#include "cpu.h"
#include "kernels.h"
#include "threads.h"

namespace dfc {
namespace {

// ---- paths

// The paths that this CPU can run, best first, then null.
const Path* const* paths() {
  static const Path* found[5] = {};
  static const bool once = [] {
    int count = 0;
#if defined(DFC_SIMDE)  // instructions that the CPU may lack are emulated: for tests
    found[count++] = &amx_path;
    found[count++] = &avx512vnni_path;
    found[count++] = &avx2_path;
#elif defined(__x86_64__)
    const Features& cpu = features();
#if defined(DFC_AMX)
    if (cpu.amx) found[count++] = &amx_path;
#endif
    if (cpu.avx512vnni) found[count++] = cpu.amd ? &avx512vnni_zen_path : &avx512vnni_path;
    if (cpu.avx2) found[count++] = &avx2_path;
#endif
    found[count] = &portable_path;
    return true;
  }();
  (void)once;
  return found;
}

const Path* find(const char* name) {
  for (const Path* const* p = paths(); *p; ++p)
    if (!name || !std::strcmp((*p)->name, name)) return *p;
  return nullptr;
}

thread_local Scratch of_rows, of_one_row;

// ---- layout

constexpr int64_t MOST = int64_t(1) << 31;  // sizes beyond are refused before they overflow
constexpr int64_t MOST_K_OF_A_SUM = 131072;  // 127 * 128 * 131072 < 2^31

constexpr uint32_t LANES = LANES_OF_2 | LANES_OF_4;
constexpr int64_t MOST_K_OF_FIXES = 65536;  // Fix has 16 bits for it

// Whether lanes may be what flags say of them.
bool are_lanes(int bits, int64_t k, int64_t group, uint32_t flags, int64_t fixes) {
  const uint32_t lanes = flags & LANES;
  if (lanes == 0) return fixes == 0;
  return lanes != LANES && bits == 8 && group == 0 && k <= MOST_K_OF_FIXES && fixes >= 0 &&
         fixes <= PANEL * MOST_K_OF_FIXES;
}

bool lay_out(int bits, int64_t n, int64_t k, int64_t group, uint32_t flags, int64_t fixes,
             Layout* out) {
  if ((bits != 4 && bits != 8) || n < 0 || k < 1 || n > MOST || k > MOST || group < 0) return false;
  if (flags & ~(HALF_SCALES | ZEROS | LANES) || (bits == 8 && flags & ZEROS)) return false;
  if (!are_lanes(bits, k, group, flags, fixes)) return false;
  if (group == 0) group = up(k, 32);
  if (group % 16 || (group > 32 && group % 32) || group > MOST_K_OF_A_SUM) return false;
  Layout w{};
  w.bits = bits;
  w.half_scales = flags & HALF_SCALES;
  w.has_zeros = flags & ZEROS;
  w.n = n;
  w.k = k;
  w.group = group;
  w.groups = (k + group - 1) / group;
  w.padded_k = w.groups * group;
  w.panels = (n + PANEL - 1) / PANEL;
  w.zeros_at = up(w.groups * PANEL * (w.half_scales ? 2 : 4), 64);
  w.lane = flags & LANES_OF_4 ? 4 : flags & LANES_OF_2 ? 2 : 0;
  w.fixes = fixes;
  w.codes_at = w.zeros_at + (w.has_zeros ? up(w.groups * PANEL, 64) : 0);
  w.group_bytes = group * PANEL * bits / 8;
  w.panel_bytes = w.codes_at + w.groups * w.group_bytes;
  w.stride_bytes = w.panel_bytes / w.groups;
  const int64_t fixes_bytes = int64_t(sizeof(Fixes)) + fixes * int64_t(sizeof(Fix));
  w.fixes_bytes = w.lane ? up(fixes_bytes, 64) : 0;
  if (w.panels && w.panel_bytes + w.fixes_bytes > (int64_t(1) << 46) / w.panels) return false;
  w.fixes_at = w.panels * w.panel_bytes;
  w.bytes = HEADER_BYTES + w.fixes_at + w.panels * w.fixes_bytes;
  *out = w;
  return true;
}

// What a buffer says of itself, if it is whole.
bool read(const uint8_t* packed, int64_t bytes, Layout* out) {
  Header h;
  if (bytes < HEADER_BYTES) return false;
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != MAGIC || h.version != VERSION) return false;
  return lay_out(int(h.bits), h.n, h.k, h.group, h.flags, h.fixes, out) && out->bytes == bytes;
}

// ---- packing

struct Packing {
  Layout w;
  const void* codes;
  const float* scale;
  const uint8_t* zeros;
  uint8_t* panels;
};

uint16_t to_half(float x) {  // exact: the caller has made sure
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, fraction = bits & 0x7fffff;
  const int32_t exponent = int32_t(bits >> 23 & 255) - 127;
  if (exponent == 128) return uint16_t(sign | 0x7c00 | fraction >> 13);
  if (exponent >= -14) return uint16_t(sign | uint32_t(exponent + 15) << 10 | fraction >> 13);
  if (exponent < -24) return uint16_t(sign);
  return uint16_t(sign | (fraction | 0x800000) >> (-exponent - 1));
}

uint8_t nibble(const uint8_t* row, int64_t i) { return uint8_t(row[i / 2] >> (i % 2 * 4) & 15); }

void pack_output(const Packing& job, uint8_t* panel, int64_t row, int64_t o) {
  const Layout& w = job.w;
  for (int64_t g = 0; g < w.groups; ++g) {
    const float s = job.scale[row * w.groups + g];
    const uint16_t h = to_half(s);
    if (w.half_scales)
      std::memcpy(panel + (g * PANEL + o) * 2, &h, 2);
    else
      std::memcpy(panel + (g * PANEL + o) * 4, &s, 4);
    if (w.has_zeros)
      panel[w.zeros_at + g * PANEL + o] = nibble(job.zeros + row * ((w.groups + 1) / 2), g);
  }
  uint8_t* codes = panel + w.codes_at + 4 * o;
  if (w.bits == 8) {
    const int8_t* from = static_cast<const int8_t*>(job.codes) + row * w.k;
    for (int64_t k = 0; k < w.k; ++k) codes[k / 4 * 64 + k % 4] = uint8_t(from[k]);
    return;
  }
  const uint8_t* from = static_cast<const uint8_t*>(job.codes) + row * (w.padded_k / 2);
  for (int64_t step = 0; step < w.padded_k / 8; ++step, from += 4, codes += 64) {
    codes[0] = uint8_t((from[0] & 15) | (from[2] & 15) << 4);
    codes[1] = uint8_t(from[0] >> 4 | (from[2] & 0xf0));
    codes[2] = uint8_t((from[1] & 15) | (from[3] & 15) << 4);
    codes[3] = uint8_t(from[1] >> 4 | (from[3] & 0xf0));
  }
}

void pack_panel(const void* what, int64_t index) {
  const Packing& job = *static_cast<const Packing*>(what);
  uint8_t* panel = job.panels + index * job.w.panel_bytes;
  std::memset(panel, 0, size_t(job.w.panel_bytes));
  const int64_t first = index * PANEL, count = least(PANEL, job.w.n - first);
  for (int64_t o = 0; o < count; ++o) pack_output(job, panel, first + o, o);
  if (!job.w.lane) return;
  uint8_t* const fixes = job.panels + job.w.fixes_at + index * job.w.fixes_bytes;
  std::memset(fixes, 0, size_t(job.w.fixes_bytes));
  write_fixes(static_cast<const int8_t*>(job.codes), job.w, index, fixes);
}

// From how many codes on for each fix (of four): what it costs is measured, as 8 to 10 codes.
constexpr int64_t CODES_A_FIX_OF_4 = 40, CODES_A_FIX_OF_2 = 32;

// ---- multiplying

struct Call {
  Job job;
  const Path* path;
  const float* x;
  int64_t apart;  // from row to row of x
  bool gelu;      // of x
  bool bytes;  // q is x + 128
  int8_t* q;
  int16_t* wide;
  uint8_t* columns;
  float* scale;
  int32_t* sum;
  int64_t tiles;  // of rows
  int64_t spans;  // of panels
  std::atomic<bool>* failed;
};

void quantize_row(const Call& c, int64_t row) {
  const Layout& w = c.job.w;
  const int64_t count = w.padded_k;  // bytes may be anything, also a size that is read again
  int8_t* const q = c.q + row * c.job.x.stride;
  const float* x = c.x + row * c.apart;
  if (c.gelu) {
    float* const y = reinterpret_cast<float*>(of_one_row.at_least(w.k * int64_t(sizeof(float))));
    if (!y) return c.failed->store(true, std::memory_order_relaxed);
    c.path->gelu(x, w.k, y);
    x = y;
  }
  const int add = c.bytes ? 128 : 0;
  c.path->quantize(x, w, add, q, c.scale + row * w.groups, c.sum + row * w.groups);
  if (!c.wide) return;
  int16_t* const to = c.wide + row * c.job.x.stride;
  for (int64_t k = 0; k < count; ++k) to[k] = q[k];
}

// Some rows, which one thread turns into columns while they are in its cache.
void quantize_rows(const void* what, int64_t index) {
  const Call& c = *static_cast<const Call*>(what);
  const int64_t begin = index * TURNED_ROWS, end = least(c.job.rows, begin + TURNED_ROWS);
  for (int64_t row = begin; row < end; ++row) quantize_row(c, row);
  if (c.columns) c.path->turn(c.job, begin, end - begin, c.columns);
}

void quantize_one(const void* what, int64_t row) {
  quantize_row(*static_cast<const Call*>(what), row);
}

void one_panel(const void* what, int64_t panel) {
  const Call& c = *static_cast<const Call*>(what);
  c.path->one_row(c.job, panel);
}

void one_tile(const void* what, int64_t index) {
  const Call& c = *static_cast<const Call*>(what);
  Tiling scratch;
  const int64_t row = index % c.tiles * c.job.tile_rows;
  const int64_t rows = least(c.job.tile_rows, c.job.rows - row);
  const int64_t panel = index / c.tiles * c.path->panels;
  const int64_t panels = least(c.path->panels, c.job.w.panels - panel);
  c.path->many_rows(c.job, panel, panels, row, rows, scratch);
}

// A thread takes this many bytes of weights at least: where it takes another's, reading ahead begins
// anew.
constexpr int64_t LEAST_CHUNK_BYTES = 64 * 1024;

void multiply(const Call& c, int32_t threads) {
  const Layout& w = c.job.w;
  const int64_t rows = c.job.rows;
  const int32_t few = rows * w.k < (c.gelu ? 16384 : 65536) ? 1 : threads;
  if (c.columns)
    spread(few, (rows + TURNED_ROWS - 1) / TURNED_ROWS, 1, quantize_rows, &c);
  else
    spread(few, rows, rows < 16 ? 1 : 4, quantize_one, &c);
  if (rows > 1) return spread(threads, c.spans * c.tiles, 1, one_tile, &c);
  const int64_t chunk = LEAST_CHUNK_BYTES / w.panel_bytes;
  spread(threads, w.panels, chunk < 1 ? 1 : chunk, one_panel, &c);
}

}  // namespace
}  // namespace dfc

using namespace dfc;

DFC_EXPORT int32_t dfc_kernels_version(void) { return int32_t(VERSION); }

DFC_EXPORT const char* dfc_kernels_path(int32_t i) {
  const Path* const* p = paths();
  for (int32_t j = 0; j <= i; ++j)
    if (!p[j]) return nullptr;
  return i < 0 ? nullptr : p[i]->name;
}

DFC_EXPORT uint32_t dfc_lanes(int64_t n, int64_t k, const int8_t* codes, int64_t* fixes) {
  *fixes = 0;
  if (!paths()[0]->turn || k > MOST_K_OF_FIXES) return 0;
  const Counts four = count_fixes(codes, n, k, 4);
  if (four.all <= n * k / CODES_A_FIX_OF_4) return *fixes = four.most, LANES_OF_4;
  const Counts two = count_fixes(codes, n, k, 2);
  if (two.all <= n * k / CODES_A_FIX_OF_2) return *fixes = two.most, LANES_OF_2;
  return 0;
}

DFC_EXPORT int64_t dfc_packed_bytes(int32_t bits, int64_t n, int64_t k, int64_t group,
                                    uint32_t flags, int64_t fixes) {
  Layout w;
  return lay_out(bits, n, k, group, flags, fixes, &w) ? w.bytes : -1;
}

DFC_EXPORT int32_t dfc_pack(int32_t bits, int64_t n, int64_t k, int64_t group, uint32_t flags,
                            int64_t fixes, const void* codes, const float* scale, const uint8_t* zeros,
                            uint8_t* packed, int64_t bytes, int32_t threads) {
  Packing job{};
  if (!lay_out(bits, n, k, group, flags, fixes, &job.w) || job.w.bytes != bytes) return DFC_MALFORMED;
  if (job.w.has_zeros != (zeros != nullptr)) return DFC_MALFORMED;
  const Header h = {MAGIC, VERSION, uint32_t(bits), flags, n, k, group, fixes, uint64_t(bytes)};
  std::memset(packed, 0, HEADER_BYTES);
  std::memcpy(packed, &h, sizeof h);
  job.codes = codes;
  job.scale = scale;
  job.zeros = zeros;
  job.panels = packed + HEADER_BYTES;
  spread(threads, job.w.panels, 8, pack_panel, &job);
  return DFC_DONE;
}

DFC_EXPORT int32_t dfc_packed_check(const uint8_t* packed, int64_t bytes, int32_t bits, int64_t n,
                                    int64_t k, int64_t group) {
  Layout have, want;
  if (!read(packed, bytes, &have) || !lay_out(bits, n, k, group, 0, 0, &want)) return DFC_MALFORMED;
  const bool same =
      have.bits == bits && have.n == n && have.k == k && have.group == want.group;
  if (!same) return DFC_MALFORMED;
  for (int64_t i = 0; have.lane && i < have.panels; ++i)
    if (!are_fixes(have, packed + HEADER_BYTES + have.fixes_at + i * have.fixes_bytes))
      return DFC_MALFORMED;
  return DFC_DONE;
}

DFC_EXPORT int32_t dfc_linear(const uint8_t* packed, int64_t bytes, const float* x, int64_t apart,
                              int64_t rows, int64_t k, const float* bias, float* y, int64_t n,
                              int32_t before, int32_t threads, const char* path) {
  if (before != DFC_NOTHING && before != DFC_GELU) return DFC_MALFORMED;
  if (rows > 1 && apart < k) return DFC_MALFORMED;
  std::atomic<bool> failed{false};
  Call c{};
  c.path = find(path);
  if (!c.path) return DFC_NO_SUCH_PATH;
  Layout& w = c.job.w;
  if (!read(packed, bytes, &w) || w.k != k || w.n != n || rows < 0 || rows > MOST)
    return DFC_MALFORMED;
  if (rows == 0 || n == 0) return DFC_DONE;
  const bool short_groups = w.groups > 1 && w.group < c.path->least_group;
  if (rows < c.path->least_rows || short_groups) c.path = c.path->other;
  c.tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  c.job.tile_rows = up((rows + c.tiles - 1) / c.tiles, TURNED_ROWS);
  c.tiles = (rows + c.job.tile_rows - 1) / c.job.tile_rows;
  c.spans = (w.panels + c.path->panels - 1) / c.path->panels;
  // Rows a multiple of 4 KiB apart would share one place in the first cache.
  const int64_t stride = up(w.padded_k, 64) + 64;
  const int64_t q_bytes = rows * stride, s_bytes = up(rows * w.groups * 4, 64);
  const bool lanes = w.lane && c.path->turn && rows >= LEAST_LANE_ROWS;
  const bool wide = !lanes && c.path->wants_wide && w.bits == 8 && rows > 1;
  const int64_t more = lanes ? c.tiles * w.padded_k * TILE_ROWS : wide ? 2 * q_bytes : 0;
  uint8_t* memory = of_rows.at_least(q_bytes + 2 * s_bytes + more);
  if (!memory) return DFC_NO_MEMORY;
  uint8_t* const last = memory + q_bytes + 2 * s_bytes;
  c.x = x;
  c.apart = apart;
  c.gelu = before == DFC_GELU;
  c.failed = &failed;
  const int64_t byte_rows = w.bits == 8 && w.groups == 1 ? c.path->byte_rows : 0;
  c.bytes = lanes || (byte_rows && rows >= byte_rows);
  c.q = reinterpret_cast<int8_t*>(memory);
  c.scale = reinterpret_cast<float*>(memory + q_bytes);
  c.sum = reinterpret_cast<int32_t*>(memory + q_bytes + s_bytes);
  if (wide) c.wide = reinterpret_cast<int16_t*>(last);
  if (lanes) c.columns = last;
  c.job.panels = packed + HEADER_BYTES;
  c.job.x = {stride, c.q, c.wide, c.columns, c.scale, c.sum};
  c.job.bias = bias;
  c.job.y = y;
  c.job.rows = rows;
  multiply(c, threads);
  return failed ? DFC_NO_MEMORY : DFC_DONE;
}

namespace {

struct Norms {
  Norm job;
  const Path* path;
};

void one_norm(const void* what, int64_t row) {
  const Norms& all = *static_cast<const Norms*>(what);
  all.path->norm(all.job, row);
}

}  // namespace

DFC_EXPORT int32_t dfc_add_norm(const float* x, const float* r, const float* weight,
                                const float* bias, float* y, int64_t rows, int64_t n, float eps,
                                int32_t threads, const char* path) {
  const Norms all = {{x, r, weight, bias, y, n, eps}, find(path)};
  if (!all.path) return DFC_NO_SUCH_PATH;
  if (rows < 0 || n < 1) return DFC_MALFORMED;
  spread(rows * n < 16384 ? 1 : threads, rows, 4, one_norm, &all);
  return DFC_DONE;
}
