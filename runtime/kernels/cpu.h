// What the CPU can do, as far as the kernels differ by it.
#pragma once

#include "kernels.h"

namespace dfc {

struct Features {
  bool avx2 = false, avx512vnni = false, avx512bf16 = false, amx = false, amd = false;
};

const Features& features();  // asked once

}  // namespace dfc
