// Flash attention (Dao and others 2022) in bf16 for one head size, HEAD; sd/kernels/avx512.py compiles and calls it.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {
typedef uint16_t Bf16;
typedef uint32_t Pair;  // two bf16, which one lane multiplies with two others

constexpr int HEAD_PAIRS = HEAD / 2;
constexpr int ROWS = 48;  // queries of a block; its scores for KEYS keys stay in the first two caches
constexpr int GROUP = 6;  // rows of a product of PANEL lanes: 24 registers of sums
constexpr int WIDTH = (HEAD + PANEL - 1) / PANEL * PANEL;
constexpr float LEAST = -std::numeric_limits<float>::max();
static_assert(HEAD % 2 == 0 && ROWS % GROUP == 0 && KEYS % PANEL == 0 && PANEL == 64, "sizes of blocks");

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// sums [GROUP][PANEL] += a [GROUP][pairs] . b [pairs][PANEL]
inline void multiply(const Pair* a, int stride_a, const Pair* b, int stride_b, int pairs, __m512 (&sums)[GROUP][4]) {
  for (int pair = 0; pair < pairs; ++pair) {
    __m512bh right[4];
    for (int j = 0; j < 4; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + pair * stride_b + 16 * j);
    for (int i = 0; i < GROUP; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(a[i * stride_a + pair]);
      for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
}

inline __m512 power_of_two(__m512 x) {  // Taylor polynomial on [-1/2, 1/2]: relative error 4e-6, of bf16 4e-3
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.3333558e-3f);
  for (float term : {9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
}

Pair pair_of(const Bf16* first, int64_t stride, int64_t count) {
  const Pair low = count > 0 ? first[0] : 0, high = count > 1 ? first[stride] : 0;
  return low | high << 16;
}
}  // namespace

// q and out [images, queries, heads, HEAD], k and v [images, keys, heads, HEAD]. strides: of image, token and head, in elements,
// of q, k, v and out; the last dimension is dense. work: images * heads * (keys rounded up to KEYS) * (HEAD + WIDTH) / 2 pairs.
extern "C" void attention(const Bf16* q, const Bf16* k, const Bf16* v, Bf16* out, Pair* work, int64_t images, int64_t heads,
                          int64_t queries, int64_t keys, const int64_t* strides, int threads) {
  const int64_t padded = rounded_up(keys, KEYS), slices = padded / 16, blocks = rounded_up(queries, ROWS) / ROWS;
  const int64_t key_size = padded * HEAD_PAIRS, size = key_size + padded / 2 * WIDTH;
  const auto head_of = [&](auto* tensor, int index, int64_t item) {
    return tensor + item / heads * strides[3 * index] + item % heads * strides[3 * index + 2];
  };
// Keys of a head as [panel][HEAD_PAIRS][PANEL], values as [padded / 2][WIDTH], with zeros behind the last of both.
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < images * heads * slices; ++item) {
    const int64_t head = item / slices, first = item % slices * 16;
    const Bf16 *key = head_of(k, 1, head), *value = head_of(v, 2, head);
    Pair* packed = work + head * size + first / PANEL * PANEL * HEAD_PAIRS + first % PANEL;
    for (int64_t i = 0; i < 16; ++i)
      for (int pair = 0; pair < HEAD_PAIRS; ++pair)
        packed[pair * PANEL + i] = pair_of(key + (first + i) * strides[4] + 2 * pair, 1, first + i < keys ? 2 : 0);
    packed = work + head * size + key_size + first / 2 * WIDTH;
    for (int64_t i = first; i < first + 16; i += 2)
      for (int column = 0; column < WIDTH; ++column)
        *packed++ = pair_of(value + i * strides[7] + column, strides[7], column < HEAD ? keys - i : 0);
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < images * heads * blocks; ++item) {
    const int64_t head = item / blocks, first = item % blocks * ROWS;
    const int rows = std::min<int64_t>(ROWS, queries - first);
    const Pair *panels = work + head * size, *values = panels + key_size;
    alignas(64) Pair query[ROWS * HEAD_PAIRS] = {}, weights[ROWS * KEYS / 2] = {};
    alignas(64) float scores[ROWS * KEYS], sums[ROWS * WIDTH] = {};
    float largest[ROWS], total[ROWS] = {}, decay[ROWS] = {};
    std::fill_n(largest, ROWS, LEAST);
    for (int row = 0; row < rows; ++row)
      std::memcpy(query + row * HEAD_PAIRS, head_of(q, 0, head) + (first + row) * strides[1], HEAD * sizeof(Bf16));
    const float factor = 1.44269504f / std::sqrt((float)HEAD);  // powers of two instead of e
    for (int64_t begin = 0; begin < keys; begin += KEYS) {
      const int used = std::min<int64_t>(KEYS, keys - begin), lanes = rounded_up(used, 32);
      for (int panel = 0; panel < used; panel += PANEL)
        for (int row = 0; row < rows; row += GROUP) {
          __m512 product[GROUP][4] = {};
          multiply(query + row * HEAD_PAIRS, HEAD_PAIRS, panels + (begin + panel) * HEAD_PAIRS, PANEL, HEAD_PAIRS, product);
          for (int i = 0; i < GROUP; ++i)
            for (int j = 0; j < 4; ++j) _mm512_store_ps(scores + (row + i) * KEYS + panel + 16 * j, product[i][j]);
        }
      for (int row = 0; row < rows; ++row) {
        float* line = scores + row * KEYS;
        std::fill(line + used, line + lanes, LEAST);
        __m512 most = _mm512_load_ps(line), sum = _mm512_setzero_ps();
        for (int i = 16; i < lanes; i += 16) most = _mm512_max_ps(most, _mm512_load_ps(line + i));
        const float now = std::max(largest[row], _mm512_reduce_max_ps(most));
        decay[row] = std::exp2((largest[row] - now) * factor);
        largest[row] = now;
        for (int i = 0; i < lanes; i += 32) {
          __m512 weight[2];
          for (int j = 0; j < 2; ++j) {
            const __m512 below = _mm512_sub_ps(_mm512_load_ps(line + i + 16 * j), _mm512_set1_ps(now));
            // The maximum is its second operand where that is NaN.
            weight[j] = _mm512_max_ps(_mm512_set1_ps(-200), _mm512_mul_ps(below, _mm512_set1_ps(factor)));
            sum = _mm512_add_ps(sum, weight[j] = power_of_two(weight[j]));
          }
          _mm512_store_si512(weights + (row * KEYS + i) / 2, (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
        }
        total[row] = total[row] * decay[row] + _mm512_reduce_add_ps(sum);
      }
      for (int column = 0; column < WIDTH; column += PANEL)
        for (int row = 0; row < rows; row += GROUP) {
          __m512 product[GROUP][4];
          float* target = sums + row * WIDTH + column;
          for (int i = 0; i < GROUP; ++i)
            for (int j = 0; j < 4; ++j)
              product[i][j] = _mm512_mul_ps(_mm512_load_ps(target + i * WIDTH + 16 * j), _mm512_set1_ps(decay[row + i]));
          multiply(weights + row * KEYS / 2, KEYS / 2, values + begin / 2 * WIDTH + column, WIDTH, lanes / 2, product);
          for (int i = 0; i < GROUP; ++i)
            for (int j = 0; j < 4; ++j) _mm512_store_ps(target + i * WIDTH + 16 * j, product[i][j]);
        }
    }
    for (int row = 0; row < rows; ++row) {
      Bf16* target = head_of(out, 3, head) + (first + row) * strides[10];
      for (int column = 0; column < HEAD; column += 16) {
        const __mmask16 mask = HEAD - column >= 16 ? 0xffff : (1 << (HEAD - column)) - 1;
        const __m512 mean = _mm512_div_ps(_mm512_load_ps(sums + row * WIDTH + column), _mm512_set1_ps(total[row]));
        _mm256_mask_storeu_epi16(target + column, mask, (__m256i)_mm512_cvtneps_pbh(mean));
      }
    }
  }
}
