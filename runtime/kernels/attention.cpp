// The C interface of attention: what is refused, and heads split over threads.
#include "attention.h"

#include <atomic>

#include "cpu.h"
#include "kernels.h"
#include "threads.h"

namespace dfc {
namespace {

#if defined(DFC_BF16)
thread_local Scratch of_block;

struct Blocks {
  const DfcAttention& a;
  int64_t count, rows;  // of a head, and of each but its last
  std::atomic<bool>& failed;
};

void one_block(const void* what, int64_t index) {
  const Blocks& b = *static_cast<const Blocks*>(what);
  uint8_t* const memory = of_block.at_least(int64_t(sizeof(Attending)));
  if (!memory) return b.failed.store(true, std::memory_order_relaxed);
  const int64_t head = index / b.count, row = index % b.count * b.rows;
  attend(b.a, head / b.a.heads, head % b.a.heads, row, least(b.rows, b.a.rows - row),
         *reinterpret_cast<Attending*>(memory));
}
#endif

bool fits(const DfcAttention& a) {
  const int64_t none[] = {a.batch, a.rows, a.keys}, one[] = {a.heads, a.shared, a.depth, a.width};
  for (int64_t size : none)
    if (size < 0) return false;
  for (int64_t size : one)
    if (size < 1) return false;
  return a.heads % a.shared == 0 && a.depth <= LARGEST_HEAD && a.width <= LARGEST_HEAD;
}

}  // namespace
}  // namespace dfc

using namespace dfc;

DFC_EXPORT int32_t dfc_attends(void) {
#if defined(DFC_SIMDE)
  return 1;
#elif defined(DFC_BF16)
  return features().avx512bf16;
#else
  return 0;
#endif
}

DFC_EXPORT int32_t dfc_attention(const DfcAttention* call, int32_t threads) {
  if (!dfc_attends()) return DFC_NO_SUCH_PATH;
  if (!fits(*call)) return DFC_MALFORMED;
#if defined(DFC_BF16)
  const int64_t heads = call->batch * call->heads;
  int64_t count = (call->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  while (heads * count < threads && call->rows > count * STEP_ROWS) count *= 2;
  if (heads * count == 0) return DFC_DONE;
  const int64_t rows = up((call->rows + count - 1) / count, STEP_ROWS);
  std::atomic<bool> failed{false};
  const Blocks blocks{*call, (call->rows + rows - 1) / rows, rows, failed};
  spread(threads, heads * blocks.count, 1, one_block, &blocks);
  if (failed) return DFC_NO_MEMORY;
#endif
  return DFC_DONE;
}
