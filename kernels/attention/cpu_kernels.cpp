// SPDX-License-Identifier: Apache-2.0
//
// Compiled once per instruction set, with FM_ISA naming it (kernels/CMakeLists.txt).
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_head.h"

namespace flash_models::FM_ISA {

inline constexpr int64_t kWorkspaceBytes = sizeof(ForwardWorkspace) > sizeof(BackwardWorkspace)
                                               ? sizeof(ForwardWorkspace)
                                               : sizeof(BackwardWorkspace);

const CpuKernels kernels{
    kLanes,        kWorkspaceBytes, forward_tile, backward_tile<Side::kQueries>, backward_tile<Side::kKeys>,
    backward_rows, backward_store};

}  // namespace flash_models::FM_ISA
