// Attention of rows to the pages of a cache, for processors with AVX2 and FMA; `native.py`
// says what is computed and how a page lies in memory. XLA calls it as a custom call (jax.ffi).
//
// A task is some tokens of a row and some of the queries of a head of keys. It goes through the pages
// that its tokens see, with a running softmax. Numbers of a token are together in a page: scores are
// sums within registers, eight of them at a time, and values are added in lanes. All queries of a
// task read eight keys, or a strip of the values, while these are in a core's L1 cache.

#include <limits>
#include <utility>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kTokens = 8;  // of a task: what they need beside a page stays in a core's cache
constexpr int64_t kHeads = 8;   // likewise, most of a group
constexpr float kMasked = -1e30f;

struct Job {
  int64_t num_rows, num_tokens, num_heads, num_kv_heads, dim, page_size, num_pages, table_size;
  int64_t num_arrays;     // of a page: keys and values, or keys whose first numbers are the values
  int64_t value_dim;      // numbers of a value
  const float* query;     // [row, token, head, dim]
  const float* pages;     // [page, array, kv head, page size, dim]
  const int32_t* table;   // [row, index]
  const int32_t* first;   // [row]: position of its first token
  const int32_t* length;  // [row]: tokens that are no padding
  float* out;             // [row, token, head, value dim]
  float scale;
  int64_t window;
  std::atomic<int64_t> next{0}, done{0};

  int64_t groups() const { return num_heads / num_kv_heads; }
  int64_t blocks() const { return (num_tokens + kTokens - 1) / kTokens; }
  int64_t parts() const { return (groups() + kHeads - 1) / kHeads; }  // of a group
  int64_t num_tasks() const { return num_rows * blocks() * num_kv_heads * parts(); }
};

// A query, its softmax so far, and what the earlier part of its result is to be multiplied with.
struct Query {
  const float* numbers;
  float* out;
  int64_t position;
  float maximum, total, kept;
  int64_t begin, end;  // of a page's tokens, those that it sees
};

// Sums of eight registers' lanes, one in each lane.
inline __m256 sum_lanes(const __m256 (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Products of a query with eight keys, summed.
inline __m256 multiply_eight(const float* query, const float* keys, int64_t dim) {
  __m256 sums[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sums[j] = _mm256_setzero_ps();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __m256 lanes = _mm256_loadu_ps(query + d);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      sums[j] = _mm256_fmadd_ps(lanes, _mm256_loadu_ps(keys + j * dim + d), sums[j]);
  }
  return sum_lanes(sums);
}

// Multiplies some sums with `kept` and adds weighted values of tokens `begin` to `end`: N registers.
template <int N>
void add_values(float* sums, float kept, const float* weights, const float* values, int64_t dim,
                int64_t begin, int64_t end) {
  __m256 lanes[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j)
    lanes[j] = _mm256_mul_ps(_mm256_loadu_ps(sums + j * kLanes), _mm256_set1_ps(kept));
  for (int64_t i = begin; i < end; ++i) {
    const __m256 weight = _mm256_broadcast_ss(weights + i);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
      lanes[j] =
          _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + i * dim + j * kLanes), lanes[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) _mm256_storeu_ps(sums + j * kLanes, lanes[j]);
}

// exp(x) for x <= 0, to two units in the last place; NaN stays NaN, and below -87 it is 0.
inline __m256 exp_of(__m256 x) {
  const __m256 is_zero = _mm256_cmp_ps(x, _mm256_set1_ps(-87.f), _CMP_LT_OQ);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, so that what is left is exact; then its power series.
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  constexpr float kSeries[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  __m256 p = _mm256_set1_ps(1.f / 5040);
#pragma GCC unroll 7
  for (int i = 0; i < 7; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kSeries[i]));
  const __m256i power = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(is_zero, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

inline float exp_of(float x) { return _mm256_cvtss_f32(exp_of(_mm256_set1_ps(x))); }

inline float most_lane(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float sum_lane(__m256 v) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

// Weights of a page's tokens that a query sees, eights of them as a whole; from its products with
// their keys, whose place they take.
void weigh(const Job& job, Query& state, float* weights) {
  const int64_t begin = state.begin, end = state.end, first = begin / kLanes * kLanes;
  const __m256 scale = _mm256_set1_ps(job.scale), masked = _mm256_set1_ps(kMasked);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto is_seen = [&](int64_t i) {
    const __m256i index = _mm256_add_epi32(lane, _mm256_set1_epi32(static_cast<int32_t>(i)));
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(static_cast<int32_t>(begin - 1))),
                         _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(end)), index)));
  };
  __m256 most = masked;
  for (int64_t i = first; i < end; i += kLanes) {
    const __m256 products = _mm256_loadu_ps(weights + i);
    // A token that is not seen may have a NaN of the page's last owner.
    const __m256 scores = _mm256_blendv_ps(masked, _mm256_mul_ps(products, scale), is_seen(i));
    _mm256_storeu_ps(weights + i, scores);
    most = _mm256_max_ps(scores, most);
  }
  const float maximum = std::max(state.maximum, most_lane(most));
  __m256 total = _mm256_setzero_ps();
  for (int64_t i = first; i < end; i += kLanes) {
    const __m256 scores = _mm256_loadu_ps(weights + i);
    const __m256 weight = exp_of(_mm256_sub_ps(scores, _mm256_set1_ps(maximum)));
    const __m256 seen = _mm256_and_ps(weight, is_seen(i));
    _mm256_storeu_ps(weights + i, seen);
    total = _mm256_add_ps(total, seen);
  }
  state.kept = exp_of(state.maximum - maximum);
  state.total = state.total * state.kept + sum_lane(total);
  state.maximum = maximum;
}

void attend(const Job& job, int64_t task) {
  const int64_t groups = job.groups(), size = job.page_size, width = job.value_dim;
  const int64_t part = task % job.parts(), head = task / job.parts() % job.num_kv_heads;
  const int64_t rest = task / job.parts() / job.num_kv_heads;
  const int64_t block = rest % job.blocks(), row = rest / job.blocks();
  const int64_t begin = block * kTokens, end = std::min(begin + kTokens, job.num_tokens);
  const int64_t valid = std::min<int64_t>(end, job.length[row]);
  const int64_t first = job.first[row], first_head = head * groups + part * kHeads;
  const int64_t num_heads = std::min(kHeads, groups - part * kHeads);
  // Of a token, its first query among all.
  const auto place = [&](int64_t token) {
    return (row * job.num_tokens + token) * job.num_heads + first_head;
  };
  for (int64_t token = begin; token < end; ++token)
    std::fill_n(job.out + place(token) * width, num_heads * width, 0.f);
  if (begin >= valid) return;

  thread_local std::vector<Query> queries;
  thread_local std::vector<float> weights;  // [query, page size]
  queries.clear();
  for (int64_t token = begin; token < valid; ++token) {
    for (int64_t i = place(token); i < place(token) + num_heads; ++i)
      queries.push_back({job.query + i * job.dim, job.out + i * width, first + token, kMasked});
  }
  weights.resize(std::max<size_t>(weights.size(), queries.size() * size));
  // A token sees the positions from `oldest` to its own.
  const auto oldest = [&](int64_t position) {
    return std::max<int64_t>(position - job.window + 1, 0);
  };
  const int64_t most_pages = std::min(job.table_size, (first + valid - 1) / size + 1);
  for (int64_t index = oldest(first + begin) / size; index < most_pages; ++index) {
    const int64_t page = job.table[row * job.table_size + index];
    if (page < 0 || page >= job.num_pages) continue;
    const int64_t numbers = size * job.dim;
    const float* keys = job.pages + (job.num_arrays * page * job.num_kv_heads + head) * numbers;
    const float* values = keys + (job.num_arrays - 1) * job.num_kv_heads * numbers;
    for (Query& one : queries) {
      one.begin = std::max<int64_t>(oldest(one.position) - index * size, 0);
      one.end = std::min(one.position + 1 - index * size, size);
    }
    // First all keys, then all values: each half of a page may fit into L1, and both do not.
    for (int64_t key = 0; key < size; key += kLanes) {
      float* products = weights.data() + key;
      for (const Query& one : queries) {
        if (one.begin < key + kLanes && key < one.end)
          _mm256_storeu_ps(products, multiply_eight(one.numbers, keys + key * job.dim, job.dim));
        products += size;
      }
    }
    float* own = weights.data();
    for (Query& one : queries) {
      if (one.begin < one.end) weigh(job, one, own);
      own += size;
    }
    for (int64_t d = 0; d < width;) {
      const bool is_wide = d + 8 * kLanes <= width;
      const float* weight = weights.data();
      for (const Query& one : queries) {
        if (one.begin < one.end)
          (is_wide ? add_values<8> : add_values<1>)(one.out + d, one.kept, weight, values + d,
                                                    job.dim, one.begin, one.end);
        weight += size;
      }
      d += is_wide ? 8 * kLanes : kLanes;
    }
  }
  for (const Query& one : queries) {
    const float rate = 1 / std::max(std::numeric_limits<float>::min(), one.total);
    for (int64_t d = 0; d < width; ++d) one.out[d] *= rate;
  }
}

int64_t work(Job& job, int64_t) {
  int64_t num_done = 0;
  for (int64_t i; (i = job.next.fetch_add(1)) < job.num_tasks(); ++num_done) attend(job, i);
  return num_done;
}

// Shapes are those of `native.py`, which has checked them.
ffi::Future native_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query,
                          ffi::Buffer<ffi::F32> pages,
                          ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> first,
                          ffi::Buffer<ffi::S32> length, float scale, int64_t window,
                          ffi::ResultBuffer<ffi::F32> out) {
  auto job = std::make_shared<Job>();
  job->num_rows = query.dimensions()[0];
  job->num_tokens = query.dimensions()[1];
  job->num_heads = query.dimensions()[2];
  job->dim = query.dimensions()[3];
  job->num_pages = pages.dimensions()[0];
  job->num_arrays = pages.dimensions()[1];
  job->num_kv_heads = pages.dimensions()[2];
  job->page_size = pages.dimensions()[3];
  job->table_size = table.dimensions()[1];
  job->value_dim = out->dimensions()[3];
  job->query = query.typed_data();
  job->pages = pages.typed_data();
  job->table = table.typed_data();
  job->first = first.typed_data();
  job->length = length.typed_data();
  job->out = out->typed_data();
  job->scale = scale;
  job->window = window;
  return share(pool, job, job->num_tasks(), work);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeAttention, native_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>());
