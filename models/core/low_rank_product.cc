// Low-rank updates of rows of float32, each with its own adapter, for processors with AVX2;
// `adapted.py` says what is computed and how the stacks lie in memory. XLA calls it as a custom call
// (jax.ffi).
//
// Rows are sorted by their adapter's slot and go in blocks of up to four that have the same: what is
// read of an adapter serves all of them. Every sum of a row is made in one order, whatever the block.

#include <cstring>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kMostRows = 4;
constexpr int64_t kMostParts = 4;

struct Block {
  int64_t slot, first, count;  // the rows are order[first] and so on
};

// What several threads share; it lives as long as the last of them.
struct Job {
  int64_t width_in, width_out, slots, rank, num_parts;
  const float* x;
  const float* a;                // [part, slot, rank, input]
  const float* b[kMostParts];    // [slot, rank, output of the part]
  int64_t widths[kMostParts];
  float* out;                    // [row, output], of which the parts lie side by side
  std::vector<int64_t> order;
  std::vector<Block> blocks;
  std::atomic<int64_t> next_block{0}, done{0};
};

inline float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Products of `kRows` rows with `kRanks` rows of an adapter.
template <int kRows, int kRanks>
void reduce(const float* const* x, const float* a, int64_t width, float* const* inner) {
  __m256 sums[kRows][kRanks];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    __m256 w[kRanks];
#pragma GCC unroll 4
    for (int r = 0; r < kRanks; ++r) w[r] = _mm256_loadu_ps(a + r * width + i);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const __m256 v = _mm256_loadu_ps(x[m] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRanks; ++r) sums[m][r] = _mm256_fmadd_ps(v, w[r], sums[m][r]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int r = 0; r < kRanks; ++r) {
      float sum = sum_of(sums[m][r]);
      for (int64_t j = i; j < width; ++j) sum = __builtin_fmaf(x[m][j], a[r * width + j], sum);
      inner[m][r] = sum;
    }
}

// Adds rows of an adapter's other side, each times a number, to eight times `kVectors` outputs.
template <int kRows, int kVectors>
inline void expand(const float* b, int64_t width, const float* const* inner, int64_t rank,
                   float* const* out) {
  __m256 sums[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) sums[m][v] = _mm256_loadu_ps(out[m] + v * kLanes);
  for (int64_t r = 0; r < rank; ++r) {
    __m256 w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_loadu_ps(b + r * width + v * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const __m256 z = _mm256_broadcast_ss(inner[m] + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] = _mm256_fmadd_ps(z, w[v], sums[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out[m] + v * kLanes, sums[m][v]);
}

template <int kRows>
void update(const Job& job, const Block& block, float* scratch) {
  const float* x[kRows];
  float* rows[kRows];
  for (int m = 0; m < kRows; ++m) {
    const int64_t row = job.order[block.first + m];
    x[m] = job.x + row * job.width_in;
    rows[m] = job.out + row * job.width_out;
  }
  constexpr int kRanks = kRows == 4 ? 2 : 4;  // sixteen registers hold no more sums
  for (int64_t part = 0; part < job.num_parts; ++part) {
    const float* a = job.a + (part * job.slots + block.slot) * job.rank * job.width_in;
    float* inner[kRows];
    for (int m = 0; m < kRows; ++m) inner[m] = scratch + m * job.rank;
    int64_t r = 0;
    const auto at = [&](int64_t rank) {
      for (int m = 0; m < kRows; ++m) inner[m] = scratch + m * job.rank + rank;
    };
    for (; r + kRanks <= job.rank; r += kRanks) {
      at(r);
      reduce<kRows, kRanks>(x, a + r * job.width_in, job.width_in, inner);
    }
    for (; r < job.rank; ++r) {
      at(r);
      reduce<kRows, 1>(x, a + r * job.width_in, job.width_in, inner);
    }
    at(0);
    const int64_t width = job.widths[part];
    const float* b = job.b[part] + block.slot * job.rank * width;
    float* out[kRows];
    int64_t o = 0;
    const auto to = [&](int64_t output) {
      for (int m = 0; m < kRows; ++m) out[m] = rows[m] + output;
    };
    for (; o + 2 * kLanes <= width; o += 2 * kLanes) {
      to(o);
      expand<kRows, 2>(b + o, width, inner, job.rank, out);
    }
    for (; o + kLanes <= width; o += kLanes) {
      to(o);
      expand<kRows, 1>(b + o, width, inner, job.rank, out);
    }
    for (; o < width; ++o)
      for (int m = 0; m < kRows; ++m) {
        float sum = rows[m][o];
        for (int64_t i = 0; i < job.rank; ++i) sum = __builtin_fmaf(inner[m][i], b[i * width + o], sum);
        rows[m][o] = sum;
      }
    for (int m = 0; m < kRows; ++m) rows[m] += width;
  }
}

int64_t work(Job& job, int64_t) {
  thread_local std::vector<float> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), kMostRows * job.rank));
  int64_t num_done = 0;
  const int64_t count = job.blocks.size();
  for (int64_t i; (i = job.next_block.fetch_add(1)) < count; ++num_done) {
    const Block& block = job.blocks[i];
    switch (block.count) {
      case 4: update<4>(job, block, scratch.data()); break;
      case 3: update<3>(job, block, scratch.data()); break;
      case 2: update<2>(job, block, scratch.data()); break;
      default: update<1>(job, block, scratch.data());
    }
  }
  return num_done;
}

// Shapes are those of `add_low_rank`, which has checked them. The output is `base`, in place.
ffi::Future low_rank_product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                             ffi::Buffer<ffi::F32> base, ffi::Buffer<ffi::S32> slot,
                             ffi::Buffer<ffi::F32> a, ffi::RemainingArgs b,
                             ffi::ResultBuffer<ffi::F32> out) {
  auto job = std::make_shared<Job>();
  const int64_t num_rows = x.dimensions()[0];
  job->width_in = x.dimensions()[1];
  job->width_out = base.dimensions()[1];
  job->num_parts = a.dimensions()[0];
  job->slots = a.dimensions()[1];
  job->rank = a.dimensions()[2];
  job->x = x.typed_data();
  job->a = a.typed_data();
  for (int64_t part = 0; part < job->num_parts; ++part) {
    const auto one = b.get<ffi::Buffer<ffi::F32>>(part).value();
    job->b[part] = one.typed_data();
    job->widths[part] = one.dimensions()[2];
  }
  job->out = out->typed_data();
  if (job->out != base.typed_data()) std::memcpy(job->out, base.typed_data(), base.size_bytes());
  std::vector<std::vector<int64_t>> by_slot(job->slots);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t mine = slot.typed_data()[row];
    if (mine >= 0 && mine < job->slots) by_slot[mine].push_back(row);
  }
  for (int64_t mine = 0; mine < job->slots; ++mine) {
    const int64_t start = job->order.size(), count = by_slot[mine].size();
    job->order.insert(job->order.end(), by_slot[mine].begin(), by_slot[mine].end());
    for (int64_t first = 0; first < count; first += kMostRows)
      job->blocks.push_back({mine, start + first, std::min(kMostRows, count - first)});
  }
  const int64_t num_blocks = job->blocks.size();
  return share(pool, job, num_blocks, work);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(LowRankProduct, low_rank_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
