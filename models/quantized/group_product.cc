// Rows of float32 times a kernel in groups, for processors with AVX2; `group_kernels.py` says what
// is computed and how a kernel lies in memory. XLA calls it as a custom call (jax.ffi).
//
// A tile is eight outputs, one in each lane of a register. Inputs become int8, a group of 32 at a
// time, and fours of them are repeated over all lanes beforehand: the innermost loop then has one
// instruction that multiplies 32 codes and inputs and sums neighbours in int16, one that adds, and
// whatever else once a group. Codes of four bits by inputs of seven, 32 of each in two sums, are
// just what an int16 has room for; codes of eight bits go in as two halves.

#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kGroup = 32;     // inputs that share a scale
constexpr int64_t kLanes = 8;      // outputs of a tile
constexpr int64_t kTiles = 8;      // of a panel
constexpr int64_t kPanel = kTiles * kLanes;
constexpr int64_t kMostRows = 16;  // of a block: a group of so many stays in a core's L1 cache

// A group of one row: each member is a register's content.
struct Inputs {
  __m256i fours[8];
  __m256 scale;
  __m256 scaled_sum;
};

// What several threads share; it lives as long as the last of them.
struct Job {
  int64_t num_rows, num_groups, num_panels, num_blocks;
  bool is_eight_bit;
  const float* x;
  const uint8_t* codes;
  const uint16_t* scale;
  const uint16_t* offset;
  float* out;
  std::vector<std::atomic<int64_t>> next_panel;  // [block]
  std::atomic<int64_t> next_thread{0}, done{0};

  explicit Job(int64_t num_rows)
      : num_rows(num_rows),
        num_blocks((num_rows + kMostRows - 1) / kMostRows),
        next_panel(num_blocks) {}

  int64_t first_row(int64_t block) const { return block * num_rows / num_blocks; }
  int64_t rows_of(int64_t block) const { return first_row(block + 1) - first_row(block); }
};

__m256i magnitudes(__m256 v) {
  // As integers they are in the order of the numbers, NaN above infinity: NaN is not lost.
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

void convert_group(const float* x, Inputs& to) {
  __m256 v[4];
  __m256i most = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_epi32(most, magnitudes(v[i]));
  }
  most = _mm256_max_epi32(most, _mm256_permute2x128_si256(most, most, 1));
  most = _mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0x4e));
  most = _mm256_max_epi32(most, _mm256_shuffle_epi32(most, 0xb1));
  const __m256 largest = _mm256_castsi256_ps(most);
  const __m256 is_zero = _mm256_cmp_ps(largest, _mm256_setzero_ps(), _CMP_EQ_OQ);
  const __m256 rate = _mm256_andnot_ps(is_zero, _mm256_div_ps(_mm256_set1_ps(127.f), largest));
  __m256i q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], rate));
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
  sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 1));
  sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
  sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
  to.scale = _mm256_mul_ps(largest, _mm256_set1_ps(1.f / 127.f));
  to.scaled_sum = _mm256_mul_ps(to.scale, _mm256_cvtepi32_ps(sum));
  // Packing works within halves of a register: the permutation puts the fours in order.
  const __m256i bytes = _mm256_permutevar8x32_epi32(
      _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])),
      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i first = _mm256_permute2x128_si256(bytes, bytes, 0x00);
  const __m256i last = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  to.fours[0] = _mm256_shuffle_epi32(first, 0x00);
  to.fours[1] = _mm256_shuffle_epi32(first, 0x55);
  to.fours[2] = _mm256_shuffle_epi32(first, 0xaa);
  to.fours[3] = _mm256_shuffle_epi32(first, 0xff);
  to.fours[4] = _mm256_shuffle_epi32(last, 0x00);
  to.fours[5] = _mm256_shuffle_epi32(last, 0x55);
  to.fours[6] = _mm256_shuffle_epi32(last, 0xaa);
  to.fours[7] = _mm256_shuffle_epi32(last, 0xff);
}

// Fills inputs [group][row].
void convert_block(const Job& job, int64_t block, Inputs* inputs) {
  const int64_t num_rows = job.rows_of(block), width = job.num_groups * kGroup;
  const float* x = job.x + job.first_row(block) * width;
  for (int64_t g = 0; g < job.num_groups; ++g)
    for (int64_t r = 0; r < num_rows; ++r)
      convert_group(x + r * width + g * kGroup, inputs[g * num_rows + r]);
}

// Sums of codes times inputs, in int16: eight lanes of two.
inline __m256i multiply(const __m256i (&w)[8], const Inputs& in) {
  __m256i sum = _mm256_maddubs_epi16(w[0], in.fours[0]);
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[j], in.fours[j]));
    asm("" : "+x"(sum));  // in this order: another needs more registers than there are
  }
  return sum;
}

// Adds a group's part of a tile to sums [row][lane].
template <bool is_eight_bit>
void add_group(const uint8_t* codes, const uint16_t* scale, const uint16_t* offset,
               const Inputs* in, int64_t num_rows, __m256* sums) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256 d = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
  const __m256 m = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset)));
  const auto bytes = [&](int j) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + j);
  };
  const auto low = [&](int j) { return _mm256_and_si256(bytes(j), low_half); };
  const auto high = [&](int j) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes(j), 4), low_half);
  };
  const auto add = [&](int64_t r, __m256i sum) {
    const __m256 factor = _mm256_mul_ps(d, in[r].scale);
    sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, sums[r]);
    sums[r] = _mm256_fmadd_ps(m, in[r].scaled_sum, sums[r]);
  };
  if (!is_eight_bit) {
    const __m256i w[8] = {low(0), low(1), low(2), low(3), high(0), high(1), high(2), high(3)};
    for (int64_t r = 0; r < num_rows; ++r) add(r, _mm256_madd_epi16(multiply(w, in[r]), ones));
    return;
  }
  // Half a code at a time: sixteen registers do not hold more.
  __m256i lows[kMostRows];
  const __m256i w[8] = {low(0), low(1), low(2), low(3), low(4), low(5), low(6), low(7)};
  for (int64_t r = 0; r < num_rows; ++r) lows[r] = _mm256_madd_epi16(multiply(w, in[r]), ones);
  const __m256i v[8] = {high(0), high(1), high(2), high(3), high(4), high(5), high(6), high(7)};
  const __m256i sixteens = _mm256_set1_epi16(16);
  for (int64_t r = 0; r < num_rows; ++r)
    add(r, _mm256_add_epi32(lows[r], _mm256_madd_epi16(multiply(v, in[r]), sixteens)));
}

template <bool is_eight_bit>
void multiply_panel(const Job& job, int64_t panel, int64_t block, const Inputs* inputs) {
  constexpr int64_t kBytes = kGroup * kLanes / (is_eight_bit ? 1 : 2);  // of a group of a tile
  const int64_t row = job.first_row(block), num_rows = job.rows_of(block);
  __m256 sums[kTiles][kMostRows];
  for (auto& tile : sums) std::fill_n(tile, num_rows, _mm256_setzero_ps());
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const Inputs* in = inputs + g * num_rows;
    const int64_t first = (panel * job.num_groups + g) * kTiles;
    for (int64_t t = 0; t < kTiles; ++t) {
      const int64_t tile = first + t;
      add_group<is_eight_bit>(job.codes + tile * kBytes, job.scale + tile * kLanes,
                              job.offset + tile * kLanes, in, num_rows, sums[t]);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    float* out = job.out + ((row + r) * job.num_panels + panel) * kPanel;
    for (int64_t t = 0; t < kTiles; ++t) _mm256_storeu_ps(out + t * kLanes, sums[t][r]);
  }
}

// A thread's share. Each converts the blocks that it works on for itself: it begins with its own, so
// most are converted once, and then helps others.
int64_t work(Job& job, int64_t num_threads) {
  // Kept by the thread for the next call: memory that is new to the process is slow to write to. 160
  // bytes for each input of the kernel.
  thread_local std::vector<Inputs> inputs;
  int64_t num_done = 0;
  const int64_t own = job.next_thread.fetch_add(1) * job.num_blocks / num_threads;
  for (int64_t i = 0; i < job.num_blocks; ++i) {
    const int64_t block = (own + i) % job.num_blocks;
    int64_t panel = job.next_panel[block].fetch_add(1);
    if (panel >= job.num_panels) continue;
    inputs.resize(std::max<size_t>(inputs.size(), kMostRows * job.num_groups));
    convert_block(job, block, inputs.data());
    for (; panel < job.num_panels; panel = job.next_panel[block].fetch_add(1), ++num_done) {
      if (job.is_eight_bit)
        multiply_panel<true>(job, panel, block, inputs.data());
      else
        multiply_panel<false>(job, panel, block, inputs.data());
    }
  }
  return num_done;
}

// Shapes are those of `project_groups`, which has checked them.
ffi::Future group_product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                         ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F16> scale,
                         ffi::Buffer<ffi::F16> offset, ffi::ResultBuffer<ffi::F32> out) {
  auto job = std::make_shared<Job>(x.dimensions()[0]);
  job->num_panels = codes.dimensions()[0];
  job->num_groups = codes.dimensions()[1];
  job->is_eight_bit = codes.dimensions()[2] == kGroup * kPanel;
  job->x = x.typed_data();
  job->codes = codes.typed_data();
  job->scale = reinterpret_cast<const uint16_t*>(scale.untyped_data());
  job->offset = reinterpret_cast<const uint16_t*>(offset.untyped_data());
  job->out = out->typed_data();
  return share(pool, job, job->num_panels * job->num_blocks, work);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupProduct, group_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
