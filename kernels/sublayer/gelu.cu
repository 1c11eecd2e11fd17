// SPDX-License-Identifier: Apache-2.0
//
// Bias and GELU (arXiv 1606.08415), exact or by tanh, and their gradients. A CTA takes a strip of columns, 8 a thread,
// and walks down the rows, two at a time; so a thread holds its biases, and the sums of their gradients, in registers.
#include <algorithm>

#include "column_sums.cuh"

namespace flash_models {
namespace {

constexpr int kMaxThreads = 256, kCtasPerSm = 4;
constexpr int kRows = 2;  // whose loads are under way together

// Strips of equal width, as few as kMaxThreads allows, and the CTAs of each.
struct Strips {
  int count, threads;
  int64_t parts;

  explicit Strips(const Rows& rows) {
    const int chunks = rows.chunks();
    count = static_cast<int>(ceil_div(chunks, kMaxThreads));
    threads = static_cast<int>(32 * ceil_div(chunks, 32 * count));
    const int64_t resident = int64_t{multiprocessors()} * kCtasPerSm * (kMaxThreads / threads) / count;
    parts = std::min(ceil_div(rows.count, kRows), std::max(resident, int64_t{1}));
  }
};

// Where a thread stands: its chunk of a row, and its rows first, first + kRows * parts, ...
struct Place {
  int chunk;
  bool inside;
  int64_t part, first_row;

  __device__ __forceinline__ Place(const Rows& rows, const Strips& strips)
      : chunk(static_cast<int>(blockIdx.x % strips.count) * strips.threads + threadIdx.x),
        inside(chunk < rows.chunks()),
        part(blockIdx.x / strips.count),
        first_row(part * kRows) {}
};

// gelu(x) = x share(x), and its slope.
template <bool kTanh>
struct Share {
  float x, value, bell;

  __device__ __forceinline__ explicit Share(float x) : x(x) {
    if constexpr (kTanh) {
      // 0.5 (1 + tanh u) is the sigmoid of 2 u, which does not overflow; 2.302... = 2 sqrt(2 / pi) log2(e)
      value = __fdividef(1.0f, 1.0f + ptx::exp2_approx(-2.3022081986f * x * (1.0f + 0.044715f * x * x)));
    } else {
      // the normal distribution: Abramowitz and Stegun 7.1.26, within 7.5e-8; 0.721... = log2(e) / 2
      bell = ptx::exp2_approx(-0.7213475204444817f * x * x);
      const float t = __fdividef(1.0f, 1.0f + 0.2316418882f * fabsf(x));
      const float series =
          t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
      value = x < 0.0f ? bell * series : 1.0f - bell * series;
    }
  }

  __device__ __forceinline__ float slope() const {
    if constexpr (kTanh)
      return value + x * value * (1.0f - value) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
    else  // 0.398... = 1 / sqrt(2 pi)
      return value + x * 0.3989422804014327f * bell;
  }
};

template <bool kTanh>
__global__ void __launch_bounds__(kMaxThreads)
    gelu_fwd(const __grid_constant__ Gelu g, const __grid_constant__ Strips strips) {
  const Place place(g.rows, strips);
  ptx::await_previous_kernel();
  if (!place.inside) return;
  const int chunks = g.rows.chunks();
  float bias[kChunk];
  load_chunk(g.bias, place.chunk, bias);
  for (int64_t row = place.first_row; row < g.rows.count; row += kRows * strips.parts) {
    PackedChunk packed[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      packed[r] = load_chunk(g.x, (row + r) * chunks + place.chunk, row + r < g.rows.count);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= g.rows.count) break;
      float x[kChunk];
      unpack(packed[r], g.x.dtype, x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[i] += bias[i];
        x[i] *= Share<kTanh>(x[i]).value;
      }
      store_chunk(g.out, (row + r) * chunks + place.chunk, x);
    }
  }
}

template <bool kTanh>
__global__ void __launch_bounds__(kMaxThreads, kCtasPerSm)
    gelu_bwd(const __grid_constant__ Gelu g, const __grid_constant__ Strips strips) {
  ptx::let_next_kernel_begin();
  const Place place(g.rows, strips);
  ptx::await_previous_kernel();
  if (!place.inside) return;
  const int chunks = g.rows.chunks();
  float bias[kChunk], sum[kChunk] = {};
  load_chunk(g.bias, place.chunk, bias);
  for (int64_t row = place.first_row; row < g.rows.count; row += kRows * strips.parts) {
    PackedChunk packed_x[kRows], packed_dout[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t number = (row + r) * chunks + place.chunk;
      packed_x[r] = load_chunk(g.x, number, row + r < g.rows.count);
      packed_dout[r] = load_chunk(g.dout, number, row + r < g.rows.count);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= g.rows.count) break;
      float x[kChunk], gradient[kChunk];
      unpack(packed_x[r], g.x.dtype, x);
      unpack(packed_dout[r], g.dout.dtype, gradient);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        gradient[i] *= Share<kTanh>(x[i] + bias[i]).slope();
        sum[i] += gradient[i];
      }
      store_chunk(g.dx, (row + r) * chunks + place.chunk, gradient);
    }
  }
  if (g.bias) store_floats(g.partial + place.part * g.rows.columns + kChunk * place.chunk, sum);
}

template <auto kByTanh, auto kExact>
void launch_strips(const char* name, const Gelu& g, void* stream) {
  const Strips strips(g.rows);
  const int64_t ctas = strips.count * strips.parts;
  if (g.tanh)
    launch<kByTanh, 0, true>(name, ctas, strips.threads, stream, g, strips);
  else
    launch<kExact, 0, true>(name, ctas, strips.threads, stream, g, strips);
}

}  // namespace

int64_t gelu_bwd_parts_cuda(const Rows& rows) { return Strips(rows).parts; }

void gelu_fwd_cuda(const Gelu& g, void* stream) {
  launch_strips<gelu_fwd<true>, gelu_fwd<false>>("gelu_fwd", g, stream);
}

void gelu_bwd_cuda(const Gelu& g, void* stream) {
  launch_strips<gelu_bwd<true>, gelu_bwd<false>>("gelu_bwd", g, stream);
  if (g.bias) launch_column_sums(g.partial, g.sums, 1, gelu_bwd_parts_cuda(g.rows), g.rows.columns, stream);
}

}  // namespace flash_models
