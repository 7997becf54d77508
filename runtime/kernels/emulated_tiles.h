// The tiles of AMX on any CPU: only for tests (DFC_SIMDE). What hardware would refuse ends the
// program, and so does reading a tile that nothing was put in since its size was set.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dfc {
namespace {

struct EmulatedTile {
  int rows, bytes;
  bool filled;
  uint8_t data[16][64];
};

struct EmulatedTiles {
  bool ready = false;
  EmulatedTile tile[8] = {};
};
thread_local EmulatedTiles emulated;

inline void tiles_require(bool holds, const char* what) {
  if (holds) return;
  std::printf("tiles: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

inline EmulatedTile& tile_at(int number, bool read) {
  tiles_require(emulated.ready, "used without a configuration");
  tiles_require(number >= 0 && number < 8, "there are eight");
  EmulatedTile& t = emulated.tile[number];
  tiles_require(t.rows > 0 && t.bytes > 0, "used without a size");
  tiles_require(!read || t.filled, "read before it was filled");
  return t;
}

inline void tiles_configure(const void* from) {
  uint8_t c[64];
  std::memcpy(c, from, 64);
  tiles_require(reinterpret_cast<uintptr_t>(from) % 64 == 0, "the configuration is not aligned");
  tiles_require(c[0] == 1 && c[1] == 0, "palette 1 begins at row 0");
  for (int i = 2; i < 16; ++i) tiles_require(c[i] == 0, "reserved bytes are 0");
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * i, 2);
    const int rows = c[48 + i];
    tiles_require(rows <= 16 && bytes <= 64, "at most 16 rows of 64 bytes");
    tiles_require((rows == 0) == (bytes == 0), "rows and bytes are 0 together");
    tiles_require(i < 8 || rows == 0, "there are eight");
    if (i >= 8) continue;
    EmulatedTile& t = emulated.tile[i];
    t.rows = rows, t.bytes = bytes, t.filled = false;
    std::memset(t.data, 0xa5, sizeof t.data);
  }
  emulated.ready = true;
}

inline void tiles_release() { emulated = EmulatedTiles(); }

inline void tile_zero(int number) {
  EmulatedTile& t = tile_at(number, false);
  std::memset(t.data, 0, sizeof t.data);
  t.filled = true;
}

inline void tile_load(int number, const void* from, int64_t stride) {
  tile_zero(number);
  EmulatedTile& t = tile_at(number, true);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(from) + r * stride, size_t(t.bytes));
}

inline void tile_store(int number, void* to, int64_t stride) {
  EmulatedTile& t = tile_at(number, true);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, t.data[r], size_t(t.bytes));
}

inline void tile_dpbssd(int sums, int left, int right) {
  EmulatedTile &c = tile_at(sums, true), &a = tile_at(left, true), &b = tile_at(right, true);
  tiles_require(sums != left && sums != right && left != right, "three tiles are different");
  tiles_require(a.rows == c.rows && b.bytes == c.bytes && a.bytes == 4 * b.rows, "sizes agree");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      uint32_t sum;  // it wraps
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 4; ++i)
          sum += uint32_t(int32_t(int8_t(a.data[m][4 * k + i])) * int8_t(b.data[k][4 * n + i]));
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace
}  // namespace dfc

#define _tile_loadconfig dfc::tiles_configure
#define _tile_release dfc::tiles_release
#define _tile_zero dfc::tile_zero
#define _tile_loadd dfc::tile_load
#define _tile_stored dfc::tile_store
#define _tile_dpbssd dfc::tile_dpbssd
